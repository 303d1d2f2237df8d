"""The host tier: bounded memory of this process.

What it is: a dictionary with a quota. What it knows nothing about: who is evicted; the store makes room
before it writes. Invariant: `used_bytes` never exceeds `quota_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanovllm.errors import TierFullError
from nanovllm.state.tiers.tier import Found, Item, total_bytes


class HostTier:
    """Sealed bytes in memory; gone with the process."""

    name = "host"
    durable = False
    shared = False

    def __init__(self, quota_bytes: int) -> None:
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self._sealed: dict[bytes, bytes] = {}

    def write(self, items: Sequence[Item]) -> None:
        """Raises TierFullError before it takes anything."""
        replaced = sum(len(self._sealed.get(item.key, b"")) for item in items)
        if self.used_bytes - replaced + total_bytes(items) > self.quota_bytes:
            raise TierFullError(f"The host tier's {self.quota_bytes:,} bytes are used up.")
        for item in items:
            self.used_bytes += len(item.sealed) - len(self._sealed.get(item.key, b""))
            self._sealed[item.key] = item.sealed

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """As written."""
        return [self._sealed.get(key) for key in keys]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Exactly."""
        return [key in self._sealed for key in keys]

    def drop(self, keys: Sequence[bytes], *, scrub: bool = False) -> None:
        """Memory goes back to the allocator; Python cannot overwrite it."""
        for key in keys:
            self.used_bytes -= len(self._sealed.pop(key, b""))

    def scan(self) -> Iterator[Found]:
        """Memory starts empty."""
        return iter(())

    def quarantine(self, key: bytes, sealed: bytes | None) -> None:
        """There is nowhere to put it: dropped."""
        self.drop([key])

    def close(self) -> None:
        """Forget everything."""
        self._sealed.clear()
        self.used_bytes = 0
