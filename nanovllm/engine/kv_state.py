"""The four verbs through which the engine touches KV: match, bind, commit, release.

What it is: the seam between scheduling and state, and `DeviceState`, the
implementation that knows one tier, the device. A state plane with more tiers
implements the same verbs: its `bind` may return a binding that is still loading.
What it knows nothing about: tensors, policies, time.

Invariants: `match` changes nothing; what `bind` gives, `release` takes back, also
when a load is in flight; a load that ends after its sequence was released is
recognised by its generation and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nanovllm.core.digest import Digest
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Match:
    """What is known of a sequence's prefix. `producer` is computing the next block of it right now."""

    num_hit_tokens: int = 0
    num_potential_tokens: int = 0
    num_held_blocks: int = 0  # hits that somebody holds: entering costs no free block for them
    producer: Sequence | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """Blocks are reserved. With a `generation`, some of their KV is still on its way, in the load of that number."""

    generation: int | None = None


@dataclass(frozen=True, slots=True)
class TransferReport:
    """The load of this generation ended: the next `num_tokens` tokens have valid KV, or not (`ok` false)."""

    seq: Sequence
    generation: int
    ok: bool
    num_tokens: int = 0
    tokens_by_tier: Mapping[str, int] = field(default_factory=dict)  # where they lay


class KVState(Protocol):
    """What the scheduler and the engine ask of state."""

    @property
    def num_blocks(self) -> int:
        """All blocks of the device."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        ...

    @property
    def num_cached_blocks(self) -> int:
        """Of the free blocks, those that can still be found."""
        ...

    def match(self, seq: Sequence) -> Match:
        """Look the prefix up. No side effects."""
        ...

    def has_room(self, seq: Sequence, headroom: int) -> bool:
        """Whether `bind` would find blocks for all known tokens and leave `headroom` free."""
        ...

    def bind(self, seq: Sequence) -> Binding:
        """Reserve the blocks and set num_cached_tokens. Call after `has_room`."""
        ...

    def grow(self, seq: Sequence) -> bool:
        """Make room for the known tokens of a bound sequence; False where no block is free."""
        ...

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` tokens have KV, computed or loaded: advance num_cached_tokens, publish full blocks."""
        ...

    def release(self, seq: Sequence) -> None:
        """Give everything back; a second call does nothing."""
        ...

    def poll(self) -> list[TransferReport]:
        """Loads that ended since the last call."""
        ...

    def is_settled(self) -> bool:
        """False while a transfer holds blocks that will come back by themselves."""
        ...


class DeviceState:
    """The verbs over one `BlockManager`: nothing is ever loading."""

    def __init__(self, block_manager: BlockManager) -> None:
        self.block_manager = block_manager
        self._producers: dict[Digest, Sequence] = {}

    @property
    def num_blocks(self) -> int:
        """Free and used."""
        return self.block_manager.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Cached free blocks included."""
        return len(self.block_manager.free_block_ids)

    @property
    def num_cached_blocks(self) -> int:
        """Free, and as good as before."""
        return self.block_manager.free_block_ids.num_cached

    def match(self, seq: Sequence) -> Match:
        """Hits on the device, or in observe mode what they would have been."""
        manager = self.block_manager
        hits = manager.match(seq)
        tokens = len(hits) * manager.block_size
        if manager.prefix_mode != "reuse":
            return Match(num_potential_tokens=tokens)
        held = sum(block.ref_count > 0 for block in hits)
        return Match(tokens, tokens, held, self._producer_behind(seq, len(hits)))

    def has_room(self, seq: Sequence, headroom: int) -> bool:
        """See `BlockManager.can_allocate`."""
        return self.block_manager.can_allocate(seq, headroom)

    def bind(self, seq: Sequence) -> Binding:
        """Allocate, and note which blocks this sequence is about to produce."""
        self.block_manager.allocate(seq)
        if self.block_manager.prefix_mode == "reuse" and not seq.prefill_only:
            for digest in self._unfinished_digests(seq):
                self._producers.setdefault(digest, seq)
        return Binding()

    def grow(self, seq: Sequence) -> bool:
        """One block where the last token opens a new one."""
        if not self.block_manager.can_append(seq):
            return False
        self.block_manager.may_append(seq)
        return True

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Publish, then advance: `hash_blocks` reads the old count."""
        before = seq.num_cached_tokens
        self.block_manager.hash_blocks(seq, before + num_tokens)
        seq.num_cached_tokens = before + num_tokens
        size = self.block_manager.block_size
        self._forget_producer(seq, before // size, seq.num_cached_tokens // size)

    def release(self, seq: Sequence) -> None:
        """Blocks go back; whoever waited for this producer takes over."""
        self._forget_producer(seq, 0, len(seq.digests))
        self.block_manager.deallocate(seq)

    def poll(self) -> list[TransferReport]:
        """Nothing is ever in flight on one tier."""
        return []

    def is_settled(self) -> bool:
        """Always, for the same reason."""
        return True

    def _unfinished_digests(self, seq: Sequence) -> list[Digest]:
        manager = self.block_manager
        first, last = seq.num_cached_tokens // manager.block_size, seq.num_tokens // manager.block_size
        return [manager.index.digest(seq, i) for i in range(first, last)]

    def _producer_behind(self, seq: Sequence, num_hits: int) -> Sequence | None:
        """Who computes the first block that `seq` misses. A prefill-only request yields, so nobody waits for it."""
        if num_hits >= (seq.num_tokens - 1) // self.block_manager.block_size:
            return None
        producer = self._producers.get(self.block_manager.index.digest(seq, num_hits))
        return None if producer is seq else producer

    def _forget_producer(self, seq: Sequence, first: int, last: int) -> None:
        for digest in seq.digests[first:last]:
            if self._producers.get(digest) is seq:
                del self._producers[digest]
