"""Objects to rank, and a naive selection to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.core.clock import VirtualClock
from nanovllm.state.policies.policy import Policy
from nanovllm.state.policies.registry import PolicyParts, make_policy


@dataclass(frozen=True)
class Thing:
    key: str
    parent_key: str | None = None
    size_bytes: int = 100
    num_tokens: int = 10
    namespace: str = ""
    kind: str = "kv"
    cost_ms: float = 5.0


def seconds(count: float) -> int:
    return round(count * 10**9)


def policy_of(name: str, clock: VirtualClock | None = None) -> Policy:
    """A policy whose T is 1 ms a new token and 0.01 ms a pair."""
    return make_policy(
        name, PolicyParts(clock or VirtualClock(), lambda cached, new: new + 0.01 * new * cached, ttl_s=60)
    )


class NaiveVictims:
    """Every object with the turn in which it was last touched; the minimum by search."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.things: dict[str, Thing] = {}
        self.outside: dict[str, int] = {}  # holds from outside: pins, leases
        self.turn: dict[str, int] = {}
        self.now = 0

    def is_held(self, key: str) -> bool:
        return bool(self.outside.get(key)) or any(thing.parent_key == key for thing in self.things.values())

    def touch(self, thing: Thing, cached: int, new: int, hit: bool) -> None:
        self.policy.on_access(thing, cached, new, hit)
        self.things[thing.key] = thing
        self.now += 1
        self.turn[thing.key] = self.now

    def candidates(self, namespace: str | None = None) -> list[Thing]:
        """The next victim first."""
        free = [thing for key, thing in self.things.items() if not self.is_held(key)]
        ours = [thing for thing in free if namespace in (None, thing.namespace)]
        return sorted(ours, key=lambda thing: (self.policy.score(thing), self.turn[thing.key]))

    def next_victim(self, namespace: str | None = None) -> Thing | None:
        return next(iter(self.candidates(namespace)), None)
