"""The policies by name, and what each needs to be made.

What it is: one table. What it knows nothing about: tiers and kinds; whoever has them makes one policy for each pair.
Invariant: a name that is not in the table is refused with the names that are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nanovllm.core.clock import Clock
from nanovllm.errors import ConfigError
from nanovllm.state.policies.gdsf import GDSF
from nanovllm.state.policies.lfu import LFU
from nanovllm.state.policies.lru import LRU
from nanovllm.state.policies.pgdsf import PGDSF, CostOf
from nanovllm.state.policies.policy import Policy
from nanovllm.state.policies.ttl import TTL
from nanovllm.state.policies.value_density import LoadOf, ValueDensity, free_load


@dataclass(frozen=True)
class PolicyParts:
    """What policies are made of. `cost_of` is T(cached, new) in ms, `load_of` the tier's price of a hit in ms."""

    clock: Clock
    cost_of: CostOf
    load_of: LoadOf = free_load
    ttl_s: float = 3600.0
    half_life_s: float = 300.0


POLICIES: Mapping[str, Callable[[PolicyParts], Policy]] = MappingProxyType(
    {
        LRU.name: lambda parts: LRU(),
        LFU.name: lambda parts: LFU(),
        GDSF.name: lambda parts: GDSF(),
        PGDSF.name: lambda parts: PGDSF(parts.cost_of),
        TTL.name: lambda parts: TTL(parts.clock, parts.ttl_s),
        ValueDensity.name: lambda parts: ValueDensity(parts.clock, parts.half_life_s, parts.load_of),
    }
)


def make_policy(name: str, parts: PolicyParts) -> Policy:
    """A policy of its own for one kind in one tier. Raises ConfigError on an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"There is no policy {name!r}.", param="policy", hint=f"There are {', '.join(POLICIES)}.")
    return POLICIES[name](parts)
