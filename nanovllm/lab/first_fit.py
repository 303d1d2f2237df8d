"""First fit: a contiguous address space of token slots, given out in one piece a request.

What it is: pieces and holes. What it knows nothing about: requests, KV, why somebody
wants a piece. Invariants: pieces never overlap; pieces and holes together are the whole space; two holes
never touch (they are one).
"""

from __future__ import annotations

from bisect import insort


class FirstFit:
    """`capacity` slots; a piece is taken from the first hole that is long enough."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pieces: dict[int, int] = {}  # start -> length
        self.holes: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, length), by start

    @property
    def num_free(self) -> int:
        """Slots in holes."""
        return self.capacity - sum(self.pieces.values())

    @property
    def longest_hole(self) -> int:
        """The longest piece that could be given out now."""
        return max((length for _, length in self.holes), default=0)

    def allocate(self, length: int) -> int | None:
        """The start of a new piece; None where no hole is long enough, however much is free in all."""
        for i, (start, hole) in enumerate(self.holes):
            if hole >= length:
                self.holes[i : i + 1] = [(start + length, hole - length)] if hole > length else []
                self.pieces[start] = length
                return start
        return None

    def extend(self, start: int, by: int) -> bool:
        """Lengthen a piece where it lies; False where what follows it is not free."""
        end = start + self.pieces[start]
        for i, (hole_start, hole) in enumerate(self.holes):
            if hole_start == end and hole >= by:
                self.holes[i : i + 1] = [(end + by, hole - by)] if hole > by else []
                self.pieces[start] += by
                return True
        return False

    def free(self, start: int) -> None:
        """Give a piece back; it becomes one hole with those beside it."""
        length = self.pieces.pop(start)
        before = [hole for hole in self.holes if hole[0] + hole[1] == start]
        behind = [hole for hole in self.holes if hole[0] == start + length]
        for hole in (*before, *behind):
            self.holes.remove(hole)
        low = before[0][0] if before else start
        insort(self.holes, (low, sum(hole[1] for hole in (*before, *behind)) + length))
