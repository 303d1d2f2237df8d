"""The tier protocol: where sealed bytes lie, by key.

What it is: all that a place for state has to offer; a fifth tier is one file with these members. What it
knows nothing about: objects, policies, what the bytes mean. A tier need not be trustworthy: its reader
verifies every envelope, so that a tier may lose, swap or garble what it holds and cost no more than time.

Invariants: `write` has kept all items or raises TierError, and durable ones survive a power loss once it
returns; `read` answers in the order asked, None where it has nothing; `drop` of a missing key is no error.
Writes and drops come from one thread, reads from one other: a tier with state of its own locks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanovllm.state.envelope import Label


@dataclass(frozen=True, slots=True)
class Item:
    """Sealed bytes on their way to a tier."""

    key: bytes
    sealed: bytes
    durable: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a tier held when it was opened: the verified label, and the bytes it takes."""

    label: Label
    size_bytes: int
    durable: bool = False


class Tier(Protocol):
    """A place for sealed bytes."""

    @property
    def name(self) -> str:
        """`host`, `disk`, `remote`, or what a fifth one is called."""
        ...

    @property
    def quota_bytes(self) -> int | None:
        """How much may live here; None where the place itself decides."""
        ...

    @property
    def used_bytes(self) -> int:
        """What lives here now. A tier that collects garbage late keeps room for it beside the quota."""
        ...

    @property
    def durable(self) -> bool:
        """Whether it honours `Item.durable`."""
        ...

    @property
    def shared(self) -> bool:
        """Whether others write here, too: then a key that was never written may be found."""
        ...

    def write(self, items: Sequence[Item]) -> None:
        """Keep all items. Raises TierFullError, TierError."""
        ...

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The sealed bytes, unverified. Raises TierError."""
        ...

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are probably here. Raises TierError."""
        ...

    def drop(self, keys: Sequence[bytes], *, scrub: bool = False) -> None:
        """Forget; with `scrub`, leave nothing of the bytes behind. Raises TierError."""
        ...

    def scan(self) -> Iterator[Found]:
        """What survived from before; called once, at the start."""
        ...

    def quarantine(self, key: bytes, sealed: bytes | None) -> None:
        """These bytes did not verify: put them where nobody reads them, for a person to look at."""
        ...

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        ...


def total_bytes(items: Iterable[Item]) -> int:
    """Sealed bytes of all items."""
    return sum(len(item.sealed) for item in items)
