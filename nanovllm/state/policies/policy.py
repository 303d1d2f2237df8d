"""The eviction policy's protocol: how much an object is worth keeping, as one number.

What it is: the words that the policies, the store and the simulator share. What it knows nothing about: tiers,
bytes, who may go. Pins, leases, moves in flight, children and quotas are predicates of the selection
(`victims.py`), never terms of a score.

Invariants of every policy:
- one instance serves one kind of object in one tier, so that its clock is that tier's own;
- the lowest score goes first; of equal scores the one that was touched longest ago (the selection sees to it);
- the score of an object changes only in `on_access` of that very object, so that a heap of scores stays true;
- `on_access` is called for objects that are in the tier or are entering it, a demotion from the tier above included;
- every call is O(1) or O(log n).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

NEVER = float("-inf")  # the score of an object that was never shown to the policy: it goes first


class Cached(Protocol):
    """What a policy may read of an object. Anything with these attributes will do."""

    @property
    def key(self) -> Hashable:
        """Its identity within the tier: a digest, a state id."""
        ...

    @property
    def size_bytes(self) -> int:
        """What evicting it frees, at least 1."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV it holds, at least 1."""
        ...

    @property
    def parent_key(self) -> Hashable | None:
        """The object it can only be used behind; None at a chain's start."""
        ...

    @property
    def namespace(self) -> str:
        """The tenant it belongs to."""
        ...

    @property
    def kind(self) -> str:
        """`kv`, `knowledge`, `session` or `meta`."""
        ...

    @property
    def cost_ms(self) -> float:
        """Milliseconds to compute it again where it stands: T(tokens before it, num_tokens)."""
        ...


class Policy(Protocol):
    """Ranks the objects of one kind in one tier."""

    @property
    def name(self) -> str:
        """As the registry and the receipts call it."""
        ...

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """A request used `obj`: it found `cached_tokens` of its prompt and computed `new_tokens`.

        `hit`: `obj` was among what was found; False: it has just been computed.
        """
        ...

    def score(self, obj: Cached) -> float:
        """What `obj` is worth since its last access; NEVER where there was none. Changes nothing."""
        ...

    def on_evict(self, objs: Iterable[Cached]) -> None:
        """These were the policy's choice and are gone: the clock advances to the highest score among them."""
        ...

    def forget(self, obj: Cached) -> None:
        """`obj` is gone for another reason (deleted, invalid, expired): nothing is learnt from it."""
        ...


@runtime_checkable
class Remembers(Policy, Protocol):
    """A policy whose knowledge is worth keeping over a restart: no clock of its own decides."""

    def memory(self, most: int) -> list[tuple[Any, ...]]:
        """(key, numbers...) of the `most` objects that are worth most, the lowest first."""
        ...

    def recall(self, obj: Cached, values: Sequence[float]) -> None:
        """Of an object that is here: what `memory` said of it. Raises ValueError on another count of numbers."""
        ...
