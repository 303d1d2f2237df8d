"""BlockManager: paged KV on the device, as ids and reference counts.

What it is: which block belongs to whom, which are free, which are shared. What it
knows nothing about: tensors, time, scheduling. `PrefixIndex` beside it knows which
blocks can be found by their tokens.

Invariants (`integrity.check_blocks` verifies them):
    free + used = all blocks; used <=> ref_count > 0; cached is a subset of free
    ref_count(b) = the number of leases that hold b: block tables, transfers in flight, pins
    hash_to_block_id[d] = b <=> blocks[b].hash_value = d
    a block without a digest has at most one block table that holds it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nanovllm.core.digest import CHAIN_ROOT, ChainLink, DigestFn, block_digest
from nanovllm.core.events import EventBus
from nanovllm.engine.eviction import EvictionPolicy, FreeBlocks, LRUEviction
from nanovllm.engine.prefix_index import Block, PrefixIndex
from nanovllm.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Lease:
    """A claim on blocks beside the block tables: a transfer in flight, a pin. Released exactly once."""

    holder: str
    block_ids: list[int]
    released: bool = False


@dataclass
class BlockManager:
    """Allocates, shares and reclaims `num_blocks` blocks of `block_size` tokens."""

    num_blocks: int
    block_size: int
    prefix_mode: str = "reuse"
    eviction: EvictionPolicy = field(default_factory=LRUEviction)
    digest_fn: DigestFn = block_digest
    events: EventBus | None = None
    on_evict: Callable[[Block], None] | None = None  # told of a published block just before it is overwritten

    def __post_init__(self) -> None:
        self.blocks = [Block(i) for i in range(self.num_blocks)]
        self.free_block_ids = FreeBlocks(range(self.num_blocks), self.eviction)
        self.used_block_ids: set[int] = set()
        self.index = PrefixIndex(self.blocks, self.block_size, self.digest_fn, self.events)
        self.hash_to_block_id = self.index.hash_to_block_id
        self.leases: set[Lease] = set()

    def match(self, seq: Sequence) -> list[Block]:
        """The blocks that hold the sequence's prefix; changes nothing. Empty with prefix_mode `off`."""
        return [] if self.prefix_mode == "off" else self.index.match(seq)

    def hits(self, seq: Sequence) -> list[Block]:
        """The matches that `allocate` will use: none unless prefix_mode is `reuse`."""
        return self.match(seq) if self.prefix_mode == "reuse" else []

    def num_computed_blocks(self, seq: Sequence) -> int:
        """Hit blocks that somebody uses now. Reviving a free cached one costs a free block: not counted."""
        return sum(block.ref_count > 0 for block in self.hits(seq))

    def can_allocate(self, seq: Sequence, headroom: int = 0) -> bool:
        """Whether the free blocks suffice for the whole sequence, with `headroom` blocks left over."""
        # TODO can_allocate
        raise NotImplementedError("nanovllm/engine/block_manager.py (can_allocate)")

    def allocate(self, seq: Sequence) -> None:
        """Build the block table: share the hits, take fresh blocks for the rest. Call after `can_allocate`.

        The blocks of all known tokens are reserved now, also where prefill will be chunked.
        """
        # TODO allocate
        raise NotImplementedError("nanovllm/engine/block_manager.py (allocate)")

    def can_append(self, seq: Sequence) -> bool:
        """Whether the known tokens fit: a token that opens a new block needs a free one."""
        return seq.num_blocks - len(seq.block_table) <= len(self.free_block_ids)

    def may_append(self, seq: Sequence) -> None:
        """Extend the table to the known tokens. Growth is never contiguous: any free block will do."""
        while len(seq.block_table) < seq.num_blocks:
            seq.block_table.append(self._take_fresh())

    def hash_blocks(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Publish the blocks that become full as valid KV grows from num_cached_tokens to `num_computed_tokens`."""
        # TODO hash_blocks
        raise NotImplementedError("nanovllm/engine/block_manager.py (hash_blocks)")

    def _publish(self, seq: Sequence, i: int, parent: ChainLink | None) -> ChainLink | None:
        """Publish logical block `i` behind `parent`; the link its own child will need, None where the chain broke.

        A block whose twin can be found already is given back and the twin taken into the table:
        the map stays one to one, and evicting one copy can never hide another.
        """
        if parent is None:
            return None
        block, holder = self.blocks[seq.block_table[i]], self.index.holder_of(self.index.digest(seq, i))
        twin = self.index.find(self.index.digest(seq, i), parent, seq.block(i))
        if twin is not None:
            self._adopt(seq, i, twin)
            return twin.link
        if holder is not None and not self.discard(holder):
            return None
        self.index.publish(block, seq, i, parent)
        return block.link

    def _adopt(self, seq: Sequence, i: int, twin: Block) -> None:
        own_id = seq.block_table[i]
        if self.prefix_mode == "reuse" and own_id != twin.block_id:  # observing changes no table
            self._hold(twin)
            seq.block_table[i] = twin.block_id
            self._unhold(own_id)

    def discard(self, holder: Block) -> bool:
        """Make a free published block findable no more; refused while it is in use."""
        if holder.ref_count > 0:
            return False
        self.index.unpublish(holder)
        self.free_block_ids.remove(holder.block_id)
        self.free_block_ids.add(holder.block_id, cached=False)
        return True

    def deallocate(self, seq: Sequence) -> None:
        """Give the table back, last block first, so that suffixes are reused before prefixes."""
        # TODO deallocate
        raise NotImplementedError("nanovllm/engine/block_manager.py (deallocate)")

    def acquire(self, block_ids: Iterable[int], holder: str) -> Lease:
        """A claim that keeps blocks alive beside any block table."""
        lease = Lease(holder, list(block_ids))
        for block_id in lease.block_ids:
            self._hold(self.blocks[block_id])
        self.leases.add(lease)
        return lease

    def extend(self, lease: Lease) -> Block:
        """One fresh block more for a lease; the caller knows that one is free."""
        lease.block_ids.append(self._take_fresh())
        return self.blocks[lease.block_ids[-1]]

    def release(self, lease: Lease) -> None:
        """Give a lease back; a second call does nothing."""
        if not lease.released:
            lease.released = True
            self.leases.discard(lease)
            for block_id in reversed(lease.block_ids):
                self._unhold(block_id)

    def _take_fresh(self) -> int:
        """The eviction point: a cached block handed out here can no longer be found."""
        block = self.blocks[self.free_block_ids.pop()]
        if self.on_evict is not None and block.hash_value is not None:
            self.on_evict(block)
        self.index.unpublish(block)
        block.ref_count, block.life = 1, block.life + 1
        self.used_block_ids.add(block.block_id)
        return block.block_id

    def _hold(self, block: Block) -> None:
        """One more holder. A free cached block is revived as it is: digest and tokens survive."""
        if block.ref_count == 0:
            self.free_block_ids.remove(block.block_id)
            self.used_block_ids.add(block.block_id)
        block.ref_count += 1

    def _unhold(self, block_id: int) -> None:
        block = self.blocks[block_id]
        block.ref_count -= 1
        if block.ref_count == 0:
            self.used_block_ids.remove(block_id)
            self.free_block_ids.add(block_id, cached=block.hash_value is not None)
