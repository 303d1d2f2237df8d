"""The device tier as the state plane sees it: the engine's block pool, by digest.

What it is: the protocol that `engine/device_tier.py` implements; tests use a fake. What it knows nothing
about: tensors, block ids, who computes. The pool itself knows what it holds, so the catalog keeps no
second map of it. All calls are made on the engine's thread, between steps.

Invariants: `hold` and `release` come in pairs, one lease per hold; `load` publishes only blocks whose
parents are on the device, in order; `discard` refuses a block that anybody holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nanovllm.state.objects import KVBlock


class DeviceTier(Protocol):
    """The block pool."""

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in canonical order."""
        ...

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        ...

    @property
    def layout(self) -> str:
        """How a block's bytes lie; stands in their envelope, and other layouts are a miss."""
        ...

    @property
    def num_layers(self) -> int:
        """The block's bytes divide evenly into so many ranges."""
        ...

    def holds(self, digest: bytes) -> bool:
        """Whether a block with this digest can be found."""
        ...

    def namespaces(self) -> set[str]:
        """Whose blocks can be found."""
        ...

    def read(self, digest: bytes) -> bytes | None:
        """The block's bytes in canonical order."""
        ...

    def load(self, blocks: Sequence[KVBlock], payloads: Sequence[bytes]) -> int:
        """Publish blocks behind each other; how many found a free block, from the first on."""
        ...

    def hold(self, digests: Sequence[bytes], holder: str) -> Any | None:
        """A lease on those that are here; None where none is."""
        ...

    def release(self, lease: Any) -> None:
        """Give it back."""
        ...

    def parent_of(self, digest: bytes) -> bytes | None:
        """The block it stands behind, b"" of a first one; None where that, or the block itself, is not here."""
        ...

    def evictable(self) -> Sequence[KVBlock]:
        """The blocks that nobody holds, the next to go first."""
        ...

    def discard(self, digest: bytes) -> bool:
        """Make a free block findable no more; False where somebody holds it, or it is not here."""
        ...
