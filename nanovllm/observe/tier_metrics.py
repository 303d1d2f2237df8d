"""The tiers' metrics: bytes, reads, failures of each tier by kind of state.

What it is: families as rows, from the facts that the state plane tells of each tier. What it knows nothing
about: the state plane, Prometheus. Invariants: counters never go down, though an engine process that is
replaced counts from 0; labels are tiers, kinds, and fixed sets of words, so there is a bounded number of them;
a tier that is there has all of them from the start, so that rate() sees the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.observe.instruments import Monotone

KINDS = ("kv", "knowledge", "session", "meta")
BREAKER = {"closed": 0, "half_open": 1, "open": 2}
Values = dict[tuple[str, ...], float]  # by the values of the labels
TierFacts = Mapping[str, Mapping[str, Any]]  # by tier: `used_bytes`, `quota_bytes`, `by_kind`, `kinds`, `breaker`


@dataclass(frozen=True)
class Row:
    """One family: a value for each combination of `labels`."""

    name: str
    text: str
    labels: tuple[str, ...]
    values: Values
    is_counter: bool


COUNTERS: dict[str, tuple[str, str, dict[str, str]]] = {  # name: text, third label, its words by the fact they are of
    "state_tier_reads": ("Pieces asked of a tier.", "outcome", {"hits": "hit", "misses": "miss", "corrupt": "corrupt"}),
    "state_tier_bytes": ("Bytes moved.", "direction", {"bytes_read": "read", "bytes_written": "written"}),
    "state_load_blocks": (
        "Blocks that requests wanted from a tier.",
        "outcome",
        {"loaded": "loaded", "not_loaded": "failed", "load_refused": "refused"},
    ),
    "state_tier_evictions": ("Pieces a policy let go.", "outcome", {"evicted": "evicted", "demoted": "moved_down"}),
}


class TierMetrics:
    """The totals of one engine's tiers."""

    def __init__(self) -> None:
        self._known: dict[str, None] = {}  # in order
        self._totals: dict[tuple[str, str, str], Monotone] = {}

    def rows(self, tiers: TierFacts) -> Iterator[Row]:
        """Every family, as of now. An engine that has just started says nothing yet: its tiers count from 0."""
        self._known |= dict.fromkeys(tiers)
        for tier in self._known:
            for kind in KINDS:
                self._take(tier, kind, tiers[tier]["kinds"].get(kind, {}) if tier in tiers else {})
        yield from _gauges(tiers)
        for name, (text, label, words) in COUNTERS.items():
            of: Values = {(tier, kind, word): self._total(tier, kind, fact)
                  for tier in self._known for kind in KINDS for fact, word in words.items()}  # fmt: skip
            yield Row(name, text, ("tier", "kind", label), of, is_counter=True)
        failed: Values = {(tier, kind): self._total(tier, kind, "failures") for tier in self._known for kind in KINDS}
        yield Row("state_tier_failures", "Calls of a tier that failed.", ("tier", "kind"), failed, is_counter=True)

    def _take(self, tier: str, kind: str, counters: Mapping[str, int]) -> None:
        for fact in ("failures", *(fact for _, _, words in COUNTERS.values() for fact in words)):
            value = counters.get(fact, 0)
            if fact == "misses":  # damage is told of by itself
                value -= counters.get("corrupt", 0)
            elif fact == "evicted":
                value -= counters.get("demoted", 0)
            self._totals.setdefault((tier, kind, fact), Monotone()).read(value)

    def _total(self, tier: str, kind: str, fact: str) -> int:
        return self._totals[tier, kind, fact].total


def _gauges(tiers: TierFacts) -> Iterator[Row]:
    held: Values = {(tier, kind): facts["by_kind"].get(kind, 0) for tier, facts in tiers.items() for kind in KINDS}
    yield Row("state_tier_held_bytes", "Bytes that lie in a tier.", ("tier", "kind"), held, is_counter=False)
    quotas: Values = {
        (tier,): facts["quota_bytes"] for tier, facts in tiers.items() if facts["quota_bytes"] is not None
    }
    yield Row("state_tier_quota_bytes", "Bytes that may lie in a tier.", ("tier",), quotas, is_counter=False)
    states: Values = {(tier, direction): float(BREAKER[state])
              for tier, facts in tiers.items() for direction, state in facts["breaker"].items()}  # fmt: skip
    yield Row("tier_breaker_state", "0 in use, 1 tried again, 2 left alone.", ("tier", "direction"), states, False)
