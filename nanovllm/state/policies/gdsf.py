"""GDSF, Greedy-Dual-Size-Frequency: what is cheap to compute again, big and seldom used goes first.

    score = clock + frequency * cost_ms / size_bytes

Source: L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs
technical report HPL-98-69R1, 1998: Pr(f) = Clock + Fr(f) * Cost(f) / Size(f); the frequency counts the present stay.

What it is: that formula, with the object's own cost. What it knows nothing about: what the request found cached;
that is what PGDSF adds. Invariant: the clock never goes back, and no score is below the clock of its time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from nanovllm.state.policies.policy import Cached
from nanovllm.state.policies.scored import GreedyDual


class GDSF(GreedyDual):
    """Score: milliseconds per byte, times the uses of this stay, on top of the clock."""

    name = "gdsf"

    def __init__(self) -> None:
        super().__init__()
        self._frequency: dict[Hashable, int] = {}

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """O(1)."""
        frequency = self._frequency[obj.key] = self._frequency.get(obj.key, 0) + 1
        self._scores[obj.key] = self.clock + frequency * obj.cost_ms / obj.size_bytes

    def forget(self, obj: Cached) -> None:
        """O(1)."""
        super().forget(obj)
        self._frequency.pop(obj.key, None)

    def memory(self, most: int) -> list[tuple[Any, ...]]:
        """The frequencies; the clock begins anew."""
        return [(key, self._frequency[key]) for key in self._highest(most)]

    def recall(self, obj: Cached, values: Sequence[float]) -> None:
        """The frequency goes on."""
        (frequency,) = values
        self._frequency[obj.key] = int(frequency)
        self._scores[obj.key] = self.clock + frequency * obj.cost_ms / obj.size_bytes
