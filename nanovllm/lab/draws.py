"""Draws: seeded numbers for made-up workloads, the same on every machine and Python.

What it is: one stream of numbers per name. What it knows nothing about: what they are
for. Invariants: streams of different names are independent, so that a knob that uses
one moves none of the others; the first n tokens of a longer draw are those of a shorter one.
Only `random.Random(str).random()` is used, whose sequence Python's documentation promises to keep;
the other methods of `random` may change between versions.
"""

from __future__ import annotations

import random


class Draws:
    """The stream named by `seed` and `names`."""

    def __init__(self, seed: int, *names: object) -> None:
        self._next = random.Random("/".join(map(str, (seed, *names)))).random  # noqa: S311  load, no secret

    def below(self, count: int) -> int:
        """0 .. count - 1."""
        return int(self._next() * count)

    def near(self, mean: int, spread: float) -> int:
        """Uniform within mean * (1 +- spread), at least 1."""
        reach = int(mean * spread)
        return max(1, mean - reach + self.below(2 * reach + 1))

    def chance(self, share: float) -> bool:
        """True in `share` of the draws."""
        return self._next() < share

    def tokens(self, count: int, vocab: int) -> tuple[int, ...]:
        """Token ids."""
        return tuple(self.below(vocab) for _ in range(count))

    def ranked(self, count: int) -> int:
        """0 .. count - 1, the k-th with a weight of 1 / (k + 1): a few are asked for often, most seldom."""
        left = self._next() * sum(1 / (k + 1) for k in range(count))
        for k in range(count):
            left -= 1 / (k + 1)
            if left < 0:
                return k
        return count - 1
