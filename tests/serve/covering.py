"""A 2-way covering array: rows in which every pair of values of every two factors occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

TRIES = 40
Pair = tuple[tuple[str, int], tuple[str, int]]


def covering_array(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Greedy: each row is the best of a few, built around a pair that is still missing."""
    dice, names = random.Random(seed), sorted(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while missing:
        wanted = min(missing)
        tries = [_row(factors, names, wanted, missing, dice) for _ in range(TRIES)]
        best = max(tries, key=lambda row: len(_pairs(row, names) & missing))
        missing -= _pairs(best, names)
        rows.append({name: factors[name][best[name]] for name in names})
    return rows


def _row(
    factors: Mapping[str, Sequence[Any]], names: list[str], wanted: Pair, missing: set[Pair], dice: random.Random
) -> dict[str, int]:
    row = dict(wanted)
    for name in dice.sample(names, len(names)):
        if name not in row:
            gains = [_gain(row, name, value, missing) for value in range(len(factors[name]))]
            row[name] = dice.choice([value for value, gain in enumerate(gains) if gain == max(gains)])
    return row


def _gain(row: Mapping[str, int], name: str, value: int, missing: set[Pair]) -> int:
    return sum(tuple(sorted([(name, value), chosen])) in missing for chosen in row.items())


def _pairs(row: Mapping[str, int], names: list[str]) -> set[Pair]:
    return set(itertools.combinations([(name, row[name]) for name in names], 2))
