"""LFU: the object that was used least often since it entered goes first.

What it is: in-cache frequency without ageing, as published comparisons use it. What it knows nothing about: when.
Invariants: a count begins anew with each stay; of equal counts the one that was touched longest ago goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.state.policies.policy import Cached
from nanovllm.state.policies.scored import Scored


class LFU(Scored):
    """Score: accesses during this stay."""

    name = "lfu"

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """O(1)."""
        self._scores[obj.key] = self._scores.get(obj.key, 0) + 1

    def memory(self, most: int) -> list[tuple[Any, ...]]:
        """The counts."""
        return [(key, self._scores[key]) for key in self._highest(most)]

    def recall(self, obj: Cached, values: Sequence[float]) -> None:
        """The count goes on."""
        (count,) = values
        self._scores[obj.key] = count
