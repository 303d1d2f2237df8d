"""Receipts: what an action on state did, or why it was refused, and the history made of them.

What it is: one record per action, with its candidates. What it knows nothing about: how actions work.
Invariants: every action ends in exactly one receipt, a refusal too; a history is bounded per object and
as a whole, and says how much it forgot.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN_CANDIDATES = 16  # a receipt names the best few; `num_candidates` says how many there were
PER_OBJECT = 64
MAX_RECEIPTS = 20_000


@dataclass(frozen=True)
class Candidate:
    """Something an action looked at. `verdict`: evicted, moved, kept or refused; `score` None where none was taken."""

    key: str
    kind: str
    size_bytes: int
    score: float | None
    verdict: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    """One action. `ok` false is a refusal or a failure: nothing changed but what `moved_bytes` says.

    `ms` is measured wall time of the action; `detail` holds what only this action has.
    """

    seq: int
    action: str
    ok: bool
    reason: str
    state_id: str | None = None
    tier: str | None = None
    size_bytes: int = 0
    ms: float = 0.0
    ts_ms: int = 0
    candidates: tuple[Candidate, ...] = ()
    num_candidates: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """An object's state now and how it came about. `forgotten`: older receipts that are no longer kept."""

    state_id: str
    facts: dict[str, Any]
    receipts: tuple[Receipt, ...]
    forgotten: int = 0


class History:
    """The last receipts of each object, and the last of all."""

    def __init__(self) -> None:
        self._by_object: OrderedDict[str, deque[Receipt]] = OrderedDict()
        self._counts: dict[str, int] = {}
        self._kept = 0
        self.recent: deque[Receipt] = deque(maxlen=1024)
        self._seq = 0

    def next_seq(self) -> int:
        """The number of the next receipt."""
        self._seq += 1
        return self._seq

    def add(self, receipt: Receipt, state_ids: Iterable[str]) -> None:
        """Keep it, for every object that it concerns."""
        self.recent.append(receipt)
        for state_id in dict.fromkeys(state_ids):
            kept = self._by_object.setdefault(state_id, deque(maxlen=PER_OBJECT))
            self._by_object.move_to_end(state_id)
            self._kept += len(kept) < PER_OBJECT
            kept.append(receipt)
            self._counts[state_id] = self._counts.get(state_id, 0) + 1
        while self._kept > MAX_RECEIPTS:
            oldest, forgotten = self._by_object.popitem(last=False)
            self._kept -= len(forgotten)
            del self._counts[oldest]

    def newest_first(self) -> Iterator[tuple[str, list[Receipt], int]]:
        """Each object, the one with the last receipt first: what is kept of it, and how many there were."""
        return ((state_id, list(kept), self._counts[state_id]) for state_id, kept in reversed(self._by_object.items()))

    def recall(self, state_id: str, receipts: Sequence[Receipt], count: int) -> None:
        """An earlier process's receipts of an object, before any of this one; numbers go on behind them."""
        for receipt in receipts:
            self.add(receipt, [state_id])
            self._seq = max(self._seq, receipt.seq)
        self._counts[state_id] = self._counts.get(state_id, 0) + max(0, count - len(receipts))

    def of(self, state_id: str) -> tuple[tuple[Receipt, ...], int]:
        """The object's receipts, oldest first, and how many older ones were forgotten."""
        kept = tuple(self._by_object.get(state_id, ()))
        return kept, self._counts.get(state_id, 0) - len(kept)
