"""PGDSF, prefix-aware Greedy-Dual-Size-Frequency: the policy of RAGCache.

    score   = clock + frequency * average                                       (equation 1)
    average = (1/m) * sum over its m misses of T(cached_i, new_i) / new_i       (equation 2)

Source: Jin et al., "RAGCache: Efficient Knowledge Caching for Retrieval-Augmented Generation", arXiv 2404.12457
(ACM TOCS 44(1), doi 10.1145/3768628). A miss is a request that used the object while it was not cached;
it computed `new_i` tokens behind `cached_i`, and each of them bears the same part of the time, so the object's size
is in the average already. The frequency counts hits and misses.

What it is: those equations over any T. What it knows nothing about: how T was measured. Invariants: the clock never
goes back; frequency and average outlive the stay, as the paper's tree keeps its nodes, for the `remembered` objects
that went last (the paper's window; without a bound the record of what is gone would outgrow the cache).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.state.policies.policy import Cached
from nanovllm.state.policies.scored import GreedyDual

CostOf = Callable[[int, int], float]  # T(cached tokens, new tokens), milliseconds
REMEMBERED = 2**16


@dataclass(slots=True)
class _Record:
    """What is known of one object, here or gone."""

    frequency: int = 0
    misses: int = 0
    total: float = 0.0  # sum of milliseconds per new token over the misses

    def average(self, obj: Cached) -> float:
        """Milliseconds per token; the object's own where it was never seen to miss, as after a restart."""
        return self.total / self.misses if self.misses else obj.cost_ms / obj.num_tokens


class PGDSF(GreedyDual):
    """Score: milliseconds per token that its misses cost on average, times its uses, on top of the clock."""

    name = "pgdsf"

    def __init__(self, cost_of: CostOf, remembered: int = REMEMBERED) -> None:
        super().__init__()
        self._cost_of, self._remembered = cost_of, remembered
        self._records: dict[Hashable, _Record] = {}
        self._gone: OrderedDict[Hashable, _Record] = OrderedDict()

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """One call of T where it missed."""
        record = self._records.get(obj.key)
        if record is None:
            record = self._records[obj.key] = self._gone.pop(obj.key) if obj.key in self._gone else _Record()
        record.frequency += 1
        if not hit and new_tokens > 0:
            record.misses += 1
            record.total += self._cost_of(cached_tokens, new_tokens) / new_tokens
        self._scores[obj.key] = self.clock + record.frequency * record.average(obj)

    def forget(self, obj: Cached) -> None:
        """Its record moves to those of the gone; the one that went first falls off."""
        super().forget(obj)
        if (record := self._records.pop(obj.key, None)) is not None:
            self._gone[obj.key] = record
            if len(self._gone) > self._remembered:
                self._gone.popitem(last=False)

    def memory(self, most: int) -> list[tuple[Any, ...]]:
        """Frequency, misses and their milliseconds per token; the clock begins anew."""
        rows = ((key, self._records[key]) for key in self._highest(most))
        return [(key, record.frequency, record.misses, record.total) for key, record in rows]

    def recall(self, obj: Cached, values: Sequence[float]) -> None:
        """The record goes on; what entering counted since is replaced."""
        frequency, misses, total = values
        record = self._records[obj.key] = _Record(int(frequency), int(misses), total)
        self._scores[obj.key] = self.clock + record.frequency * record.average(obj)
