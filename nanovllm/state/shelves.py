"""Shelves: the objects in the order in which a list shows them, by whose they are and of what kind.

What it is: for each tenant and kind, hints apart, a sorted row of (created_ms, state_id) and what those objects hold.
What it knows nothing about: names, owners, bytes in tiers, who may see what. Invariants: an object stands on exactly
one shelf; a page costs what it shows and one step per shelf it is taken from, however many objects there are.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from nanovllm.state.objects import StateObject


class ShelfKey(NamedTuple):
    """Which shelf: hints are counted by themselves, for nobody put them."""

    namespace: str
    kind: str
    is_hint: bool = False


@dataclass
class Shelf:
    """The objects of one shelf, the oldest first, and the bytes of their texts, messages and token ids."""

    row: list[tuple[int, str]] = field(default_factory=list)
    size_bytes: int = 0


NOTHING = Shelf()


class Shelves:
    """All shelves that have an object."""

    def __init__(self) -> None:
        self._shelves: dict[ShelfKey, Shelf] = {}
        self._ends: list[tuple[int, str]] = []  # when, in Unix ms, and whose id; sorted

    def add(self, obj: StateObject) -> None:
        """Put it on its shelf."""
        shelf = self._shelves.setdefault(shelf_of(obj), Shelf())
        insort(shelf.row, place_in_list(obj))
        shelf.size_bytes += obj.payload_bytes
        if obj.expires_ms is not None:
            insort(self._ends, (obj.expires_ms, obj.state_id))

    def remove(self, obj: StateObject) -> None:
        """Take it off; an empty shelf goes, too."""
        key = shelf_of(obj)
        shelf = self._shelves[key]
        del shelf.row[bisect_right(shelf.row, place_in_list(obj)) - 1]
        shelf.size_bytes -= obj.payload_bytes
        if not shelf.row:
            del self._shelves[key]
        if obj.expires_ms is not None:
            del self._ends[bisect_left(self._ends, (obj.expires_ms, obj.state_id))]

    def expired(self, now_ms: int) -> list[str]:
        """The ids of what has lived its time, the first first."""
        return [state_id for _, state_id in self._ends[: bisect_left(self._ends, (now_ms + 1,))]]

    def on(self, key: ShelfKey) -> Shelf:
        """That shelf; to be read only."""
        return self._shelves.get(key, NOTHING)

    def walk(self, wanted: Callable[[ShelfKey], bool], after: tuple[Any, ...] = ()) -> Iterator[str]:
        """The ids of what stands on these shelves, the oldest first, beginning behind `after`."""
        rows = [shelf.row for key, shelf in self._shelves.items() if wanted(key)]
        starts = [islice(row, bisect_right(row, after), None) for row in rows]
        return (state_id for _, state_id in heapq.merge(*starts))


def place_in_list(obj: StateObject) -> tuple[int, str]:
    """Where it stands in every list; it never changes."""
    return obj.created_ms, obj.state_id


def shelf_of(obj: StateObject) -> ShelfKey:
    """Where it stands."""
    return ShelfKey(obj.namespace, obj.kind, obj.is_hint)
