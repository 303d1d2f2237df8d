"""The device tier as the state plane sees it: the block pool, by digest (`state/tiers/device.py`).

What it is: `DeviceTier` of the state plane over a `BlockManager` and the bytes behind its block ids. What it
knows nothing about: other tiers, requests, tensors. The block manager stays the only map of the pool.

Invariants: what is loaded is published behind its parent or not at all; every hold is a lease that the
integrity check counts; a load takes free blocks only, and never one of the chain it is loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nanovllm.core.digest import CHAIN_ROOT
from nanovllm.engine.block_manager import BlockManager, Lease
from nanovllm.engine.prefix_index import Block
from nanovllm.state.objects import DEFAULT_NAMESPACE, KVBlock


class BlockBytes(Protocol):
    """The memory behind block ids, in canonical order."""

    block_bytes: int

    def read_block(self, block_id: int) -> bytes:
        """A copy of a block's bytes."""
        ...

    def write_block(self, block_id: int, data: bytes) -> None:
        """Overwrite a block that the caller holds."""
        ...


@dataclass
class DeviceStateTier:
    """The pool. `layout` names how a block's bytes lie; bytes of another layout are a miss."""

    manager: BlockManager
    memory: BlockBytes
    layout: str
    num_layers: int

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        return self.manager.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.memory.block_bytes

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self.manager.num_blocks

    def holds(self, digest: bytes) -> bool:
        """Whether a block with this digest can be found."""
        return digest in self.manager.hash_to_block_id

    def namespaces(self) -> set[str]:
        """Whose blocks can be found."""
        return {store_namespace(block.namespace) for block in self.manager.blocks if block.hash_value is not None}

    def read(self, digest: bytes) -> bytes | None:
        """The block's bytes in canonical order."""
        block = self.manager.index.holder_of(digest)
        return None if block is None else self.memory.read_block(block.block_id)

    def load(self, blocks: Sequence[KVBlock], payloads: Sequence[bytes]) -> int:
        """Publish blocks behind each other; how many found a free block, from the first on."""
        leases: list[Lease] = []
        try:
            for block, payload in zip(blocks, payloads, strict=True):
                lease = self._load_one(block, payload)
                if lease is None:
                    break
                leases.append(lease)
            return len(leases)
        finally:
            for lease in reversed(leases):
                self.manager.release(lease)

    def hold(self, digests: Sequence[bytes], holder: str) -> Lease | None:
        """A lease on those that are here; None where none is."""
        ids = [i for digest in digests if (i := self.manager.hash_to_block_id.get(digest)) is not None]
        return self.manager.acquire(ids, holder) if ids else None

    def release(self, lease: Lease) -> None:
        """Give it back; a second call does nothing."""
        self.manager.release(lease)

    def parent_of(self, digest: bytes) -> bytes | None:
        """The block it stands behind, b"" of a first one; None where that, or the block itself, is not here."""
        block = self.manager.index.holder_of(digest)
        named = None if block is None else self.describe(block)
        return None if named is None else named.parent or b""

    def evictable(self) -> list[KVBlock]:
        """The blocks that nobody holds and that can be named, the next to go first."""
        free = (self.manager.blocks[i] for i in self.manager.free_block_ids.cached_ids())
        return [named for block in free if (named := self.describe(block)) is not None]

    def discard(self, digest: bytes) -> bool:
        """Make a free block findable no more; False where somebody holds it, or it is not here."""
        block = self.manager.index.holder_of(digest)
        return block is not None and self.manager.discard(block)

    def describe(self, block: Block, cost_ms: float = 0.0) -> KVBlock | None:
        """A published block without its bytes; None where its parent is gone: nothing could find it any more."""
        parent = None
        if block.parent != CHAIN_ROOT:
            before = self.manager.blocks[block.parent[0]]
            parent = before.hash_value if before.link == block.parent else None
            if parent is None:
                return None
        if block.hash_value is None:
            return None
        return KVBlock(block.hash_value, parent, block.token_ids, store_namespace(block.namespace), cost_ms)

    def _load_one(self, block: KVBlock, payload: bytes) -> Lease | None:
        """Hold the parent, take a block, fill and publish it; one that is here already is held instead."""
        manager, index = self.manager, self.manager.index
        before = None if block.parent is None else index.holder_of(block.parent)
        if len(payload) != self.block_bytes or (before is None and block.parent is not None):
            return None
        link = CHAIN_ROOT if before is None else before.link
        here = index.holder_of(block.digest)
        if here is not None and index.find(block.digest, link, list(block.token_ids)) is not None:
            return manager.acquire([here.block_id], "load")
        if here is not None and not manager.discard(here):
            return None
        lease = manager.acquire([] if before is None else [before.block_id], "load")
        if not manager.free_block_ids:
            manager.release(lease)
            return None
        fresh = manager.extend(lease)
        self.memory.write_block(fresh.block_id, payload)
        fresh.namespace = engine_namespace(block.namespace)
        index.enter(fresh, block.digest, block.token_ids, link, block.parent or b"")
        return lease


def store_namespace(namespace: str) -> str:
    """The engine's namespace as the state plane calls it: the engine's own, empty one is its `default`."""
    return namespace or DEFAULT_NAMESPACE


def engine_namespace(namespace: str) -> str:
    """The reverse."""
    return "" if namespace == DEFAULT_NAMESPACE else namespace
