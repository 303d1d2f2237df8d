"""What a kind of state has to say: naming, value, consistency, isolation and default policy.

What it is: the questions that differ from kind to kind, with the answers that most share; one subclass a
file. What it knows nothing about: tiers, bytes, the catalog. Invariant: a kind decides and changes nothing.

The five words of the course's table (generation, residency, reuse condition, correctness, transfer cost)
are attributes, so that the documentation's table is printed from the code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from nanovllm.state.objects import StateObject, Storable
from nanovllm.state.policies.policy import Cached


class Kind(ABC):
    """One kind. Class attributes are its row of the table; methods are its rules."""

    name: ClassVar[str]
    generation: ClassVar[str]
    residency: ClassVar[str]
    reuse: ClassVar[str]
    correctness: ClassVar[str]
    transfer: ClassVar[str]
    lost: ClassVar[str]
    durable: ClassVar[bool] = False  # whether its text is on the disk before `put` answers
    ttl_s: ClassVar[float | None] = None
    share: ClassVar[float] = 1.0  # of a tier: who has most for its share pays first; what nobody named has the least
    policies: ClassVar[Mapping[str, str]] = MappingProxyType({})  # tier -> policy; lru where nothing is said

    def policy_in(self, tier: str) -> str:
        """The default policy for this kind in that tier."""
        return self.policies.get(tier, "lru")

    @abstractmethod
    def accepts(self, obj: Storable) -> bool:
        """Whether this kind can hold such an object."""

    def visible_to(self, obj: StateObject, namespace: str) -> bool:
        """Isolation: whether that tenant may see it."""
        return obj.namespace == namespace

    def replaces(self, old: StateObject, new: StateObject) -> bool:
        """Consistency: whether a new object of the same name takes the old one's place, rather than being refused."""
        return True

    def value_ms(self, entry: Cached, load_ms: float) -> float | None:
        """Milliseconds that keeping these bytes saves at the next use; None where the cost is not known."""
        return max(entry.cost_ms - load_ms, 0.0) if entry.cost_ms > 0 else None
