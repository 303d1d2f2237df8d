"""Which free block goes next: the free list and the eviction object behind it.

What it is: the order in which blocks with `ref_count` 0 are handed out. What it
knows nothing about: tokens, sequences, bytes. Invariants: every operation is O(1)
for LRU; a block that holds nothing shareable is always handed out before one that
does, so cached prefixes outlive partial tails (the policy of vLLM PR #42656).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """Ranks cached free blocks. Ids only: a policy that needs more is told by its own caller."""

    def insert(self, block_id: int) -> None:
        """A cached block became free."""

    def remove(self, block_id: int) -> None:
        """A cached free block was revived, or lost its digest."""

    def victim(self) -> int:
        """Choose and remove the next cached block to overwrite."""
        ...

    def __len__(self) -> int: ...
    def __contains__(self, block_id: object) -> bool: ...
    def __iter__(self) -> Iterator[int]: ...


class LRUEviction:
    """Least recently freed first. A sequence frees its last block first, so suffixes go before prefixes."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def insert(self, block_id: int) -> None:
        """Most recent end."""
        self._order[block_id] = None

    def remove(self, block_id: int) -> None:
        """O(1), wherever it stands."""
        del self._order[block_id]

    def victim(self) -> int:
        """The least recent one."""
        return self._order.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._order

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)


class FreeBlocks:
    """All blocks with `ref_count` 0: the empty ones in FIFO order, then the cached ones by policy."""

    def __init__(self, block_ids: range, eviction: EvictionPolicy) -> None:
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(block_ids)
        self._cached = eviction

    @property
    def num_cached(self) -> int:
        """Free blocks that are still matchable."""
        return len(self._cached)

    def cached_ids(self) -> list[int]:
        """Those blocks, in the order of the policy."""
        return list(self._cached)

    def add(self, block_id: int, *, cached: bool) -> None:
        """Take in a block that nobody holds any more."""
        if cached:
            self._cached.insert(block_id)
        else:
            self._empty[block_id] = None

    def remove(self, block_id: int) -> None:
        """Take out a given block: it is revived."""
        if block_id in self._empty:
            del self._empty[block_id]
        else:
            self._cached.remove(block_id)

    def pop(self) -> int:
        """Take out the block that costs least: an empty one, else the policy's victim."""
        return self._empty.popitem(last=False)[0] if self._empty else self._cached.victim()

    def __len__(self) -> int:
        return len(self._empty) + len(self._cached)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._empty or block_id in self._cached

    def __iter__(self) -> Iterator[int]:
        yield from self._empty
        yield from self._cached
