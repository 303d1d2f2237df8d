"""A heap of scores whose entries can be changed and removed.

What it is: keys by score, the lowest first; of equal scores the one with the lower `turn`. What it knows nothing
about: what keys and turns stand for. Invariants: `push` and `peek` are O(log n) amortised, `discard` is O(1); a
replaced entry stays inside until it comes up, and those never outnumber the live ones by more than SLACK.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush

SLACK = 64


class ScoreHeap:
    """Lowest score first, with replacement (lazy deletion)."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Hashable]] = []
        self._live: dict[Hashable, tuple[float, int, Hashable]] = {}  # key -> its only true entry

    def push(self, key: Hashable, score: float, turn: int) -> None:
        """Put in, or give a new score. No two keys have one turn."""
        self._live[key] = entry = (score, turn, key)
        heappush(self._entries, entry)
        if len(self._entries) > 2 * len(self._live) + SLACK:
            self._entries = list(self._live.values())
            heapify(self._entries)

    def discard(self, key: Hashable) -> None:
        """Take out, if it is in."""
        self._live.pop(key, None)

    def peek(self) -> Hashable | None:
        """The key with the lowest score; None when empty."""
        while self._entries:
            entry = self._entries[0]
            if self._live.get(entry[2]) == entry:
                return entry[2]
            heappop(self._entries)
        return None

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._live)
