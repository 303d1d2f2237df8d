"""A device tier without tensors: a few blocks by digest, least recently freed first."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanovllm.state.objects import KVBlock


def kv_bytes(digest: bytes, size: int) -> bytes:
    """What a model would have computed for this block."""
    return hashlib.shake_128(digest).digest(size)


@dataclass
class FakeDevice:
    """Holds what it was given; a hold keeps a block, `discard` and eviction take free ones."""

    num_blocks: int = 8
    block_size: int = 4
    block_bytes: int = 240
    layout: str = "4x3x2x1x10/bf16"
    num_layers: int = 3
    blocks: OrderedDict[bytes, tuple[KVBlock, bytes]] = field(default_factory=OrderedDict)
    holds_on: dict[bytes, int] = field(default_factory=dict)

    def compute(self, blocks: Sequence[KVBlock]) -> None:
        """As a prefill would."""
        self.load(blocks, [kv_bytes(block.digest, self.block_bytes) for block in blocks])

    def holds(self, digest: bytes) -> bool:
        return digest in self.blocks

    def namespaces(self) -> set[str]:
        return {block.namespace for block, _ in self.blocks.values()}

    def read(self, digest: bytes) -> bytes | None:
        return self.blocks[digest][1] if digest in self.blocks else None

    def load(self, blocks: Sequence[KVBlock], payloads: Sequence[bytes]) -> int:
        for i, (block, payload) in enumerate(zip(blocks, payloads)):
            assert payload == kv_bytes(block.digest, self.block_bytes), "wrong bytes reached the device"
            assert block.parent is None or block.parent in self.blocks, "a block without its parent"
            if block.digest not in self.blocks and len(self.blocks) == self.num_blocks:
                free = self.evictable()
                if not free:
                    return i
                self.discard(free[0].digest)
            self.blocks[block.digest] = (block, payload)
        return len(blocks)

    def hold(self, digests: Sequence[bytes], holder: str) -> object | None:
        held = [digest for digest in digests if digest in self.blocks]
        for digest in held:
            self.holds_on[digest] = self.holds_on.get(digest, 0) + 1
        return held or None

    def release(self, lease: list[bytes]) -> None:
        for digest in lease:
            self.holds_on[digest] -= 1
            assert self.holds_on[digest] >= 0

    def parent_of(self, digest: bytes) -> bytes | None:
        return self.blocks[digest][0].parent or b"" if digest in self.blocks else None

    def evictable(self) -> list[KVBlock]:
        parents = {block.parent for block, _ in self.blocks.values()}
        return [b for b, _ in self.blocks.values() if not self.holds_on.get(b.digest) and b.digest not in parents]

    def discard(self, digest: bytes) -> bool:
        if digest not in self.blocks or self.holds_on.get(digest):
            return False
        del self.blocks[digest]
        return True
