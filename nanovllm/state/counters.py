"""What happened at one tier since the start: in all, and by kind of state.

What it is: two levels of the same sums. What it knows nothing about: tiers, breakers, who reads it. Invariants:
counters only grow; whatever is told of a piece is counted in the total and under its kind; calls (`reads`,
`writes`) and refusals have no kind. A failure is one call; it stands under every kind that the call was for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

OF_A_KIND = ("hits", "misses", "bytes_read", "bytes_written", "failures", "corrupt", "evicted", "demoted", "loaded",
             "not_loaded", "load_refused")  # fmt: skip
LOADS = OF_A_KIND[-3:]


@dataclass
class Counters:
    """The sums. `hits`, `misses`, `corrupt`, `evicted` and `demoted` are pieces: a block, or an object's text.

    `loaded`, `not_loaded` and `load_refused` are blocks that an engine wanted for a request: they came, did not come,
    or computing was cheaper.
    """

    hits: int = 0
    misses: int = 0
    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    failures: int = 0
    corrupt: int = 0
    refused: int = 0
    evicted: int = 0
    evicted_bytes: int = 0
    demoted: int = 0
    loaded: int = 0
    not_loaded: int = 0
    load_refused: int = 0
    corrupt_by_reason: dict[str, int] = field(default_factory=dict)


@dataclass
class Tally:
    """One tier's."""

    total: Counters = field(default_factory=Counters)
    kinds: defaultdict[str, Counters] = field(default_factory=lambda: defaultdict(Counters))

    def read(self, kind: str, found: bytes | str | None) -> None:
        """A piece was asked for: its bytes came, or the reason why they are not believed, or nothing."""
        for counters in self._of((kind,)):
            if isinstance(found, bytes):
                counters.hits += 1
                counters.bytes_read += len(found)
                continue
            counters.misses += 1
            if found is not None:
                counters.corrupt += 1
                counters.corrupt_by_reason[found] = counters.corrupt_by_reason.get(found, 0) + 1

    def wrote(self, kind: str, size_bytes: int) -> None:
        """A piece has arrived."""
        for counters in self._of((kind,)):
            counters.bytes_written += size_bytes

    def failed(self, kinds: Iterable[str]) -> None:
        """A call failed."""
        for counters in self._of(kinds):
            counters.failures += 1

    def evicted(self, kind: str, size_bytes: int) -> None:
        """A policy let a piece go."""
        for counters in self._of((kind,)):
            counters.evicted += 1
            counters.evicted_bytes += size_bytes

    def demoted(self, kind: str) -> None:
        """What went was copied to a lower tier first."""
        for counters in self._of((kind,)):
            counters.demoted += 1

    def wanted(self, kind: str, outcome: str) -> None:
        """A block was wanted for a request, with an outcome of `LOADS`."""
        for counters in self._of((kind,)):
            setattr(counters, outcome, getattr(counters, outcome) + 1)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """What has a kind, by kind."""
        return {kind: {name: getattr(own, name) for name in OF_A_KIND} for kind, own in sorted(self.kinds.items())}

    def _of(self, kinds: Iterable[str]) -> Iterator[Counters]:
        yield self.total
        for kind in set(kinds):
            yield self.kinds[kind]
