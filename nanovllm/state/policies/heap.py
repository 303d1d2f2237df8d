"""A heap of scores whose entries can be changed and removed.

What it is: keys by score, the lowest first; equal scores in the order in which they were pushed. What it knows
nothing about: what the keys stand for. Invariants: `push` and `discard` are O(log n) amortised, `peek` too; a
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
        self._live: dict[Hashable, int] = {}  # key -> turn of its only true entry
        self._turn = 0

    def push(self, key: Hashable, score: float) -> None:
        """Put in, or give a new score."""
        self._turn += 1
        self._live[key] = self._turn
        heappush(self._entries, (score, self._turn, key))
        if len(self._entries) > 2 * len(self._live) + SLACK:
            self._entries = [entry for entry in self._entries if self._live.get(entry[2]) == entry[1]]
            heapify(self._entries)

    def discard(self, key: Hashable) -> None:
        """Take out, if it is in."""
        self._live.pop(key, None)

    def peek(self) -> Hashable | None:
        """The key with the lowest score; None when empty."""
        while self._entries:
            _, turn, key = self._entries[0]
            if self._live.get(key) == turn:
                return key
            heappop(self._entries)
        return None

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: object) -> bool:
        return key in self._live

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._live)
