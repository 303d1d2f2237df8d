"""A trace through one cache: the policies of the state plane, and no engine.

What it is: for each prompt in turn, what is found, what is computed, what goes; with the very policy and selection
code that the store runs. What it knows nothing about: queues, batches, decoding. A request is served the instant it
comes, and its blocks can be found by the next one; both overstate what a busy server would reuse.

Invariants: the cache never holds more than its capacity, nor a block without its parent; nothing goes for a request
that the request itself uses (its chain is held while it is served); one token of a prompt is always computed, so
whole-prompt hits count one token less; hit blocks are counted as the trace names them, partial ones included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanovllm.core.clock import VirtualClock
from nanovllm.core.cost_table import CostTable
from nanovllm.errors import ConfigError
from nanovllm.lab.cache_trace import KIND, Block, CacheTrace, Prompt
from nanovllm.lab.clairvoyant import Clairvoyant
from nanovllm.state.policies.policy import Policy
from nanovllm.state.policies.registry import PolicyParts, make_policy
from nanovllm.state.policies.ttl import TTL
from nanovllm.state.policies.victims import Victims

LABEL = "simulated"
MOST_SECONDS = 10**9


@dataclass(frozen=True)
class ReplaySetting:
    """What is the same for all policies of a comparison. Raises ConfigError on a lifetime that is none."""

    costs: CostTable
    ttl_s: float = 600.0
    half_life_s: float = 300.0
    second_sight: bool = False  # where room must be made, only for blocks that were computed before

    def __post_init__(self) -> None:
        for param, seconds in (("ttl", self.ttl_s), ("half_life", self.half_life_s)):
            if not (0 < seconds < MOST_SECONDS):
                raise ConfigError(f"{param} is a number of seconds from 0 to {MOST_SECONDS:,}.", param=param)

    def cost_of(self, cached: int, new: int) -> float:
        """T(cached, new), milliseconds."""
        return self.costs.estimate(cached, new).ms


@dataclass
class CacheRun:
    """What one policy did with one trace at one capacity. `capacity_blocks` None: an infinite cache."""

    policy: str
    capacity_blocks: int | None
    blocks: int = 0
    hit_blocks: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    prefill_ms: float = 0.0  # of all prompts without a cache
    saved_ms: float = 0.0
    evicted_blocks: int = 0
    refused_blocks: int = 0  # computed, but not taken in: no room beside the request's own, or not worth it
    seconds: float = field(default=0.0, compare=False)  # that the replay itself took

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the shares."""
        return {
            **vars(self),
            "prefill_ms": round(self.prefill_ms, 1),
            "saved_ms": round(self.saved_ms, 1),
            "seconds": round(self.seconds, 2),
            "block_hit_share": round(self.hit_blocks / self.blocks, 6),
            "token_hit_share": round(self.hit_tokens / self.tokens, 6),
            "saved_share": round(self.saved_ms / self.prefill_ms, 6) if self.prefill_ms else 0.0,
        }


Admits = Callable[[Block, Block], bool]  # (to take in, would go): whether it is taken in


def always(block: Block, victim: Block) -> bool:
    """Everything computed is taken in."""
    return True


class Cache:
    """One tier of blocks of one size."""

    def __init__(self, capacity: int | None, policy: Policy, admits: Admits = always) -> None:
        self._capacity, self._admits = capacity, admits
        self.victims: Victims[Block] = Victims({KIND: policy})
        self.evicted = 0

    def find(self, blocks: tuple[Block, ...]) -> int:
        """How many blocks of the chain are here, from its start."""
        for index, block in enumerate(blocks):
            if block.key not in self.victims:
                return index
        return len(blocks)

    def serve(self, blocks: tuple[Block, ...], found: int, cached_tokens: int, new_tokens: int) -> int:
        """Use the `found` first blocks of the chain and take in the others, in order. Returns how many were taken."""
        tip: Block | None = None  # what is behind it has a child here; only the end of the chain must be held
        for block in blocks[:found]:
            self.victims.touch(block, cached_tokens, new_tokens, True)
            tip = block
        if tip is not None:
            self.victims.hold(tip.key)
        taken = 0
        for block in blocks[found:]:
            if not self._make_room(block):
                break
            self.victims.hold(block.key)
            self.victims.touch(block, cached_tokens, new_tokens, False)
            if tip is not None:
                self.victims.release(tip.key)
            tip = block
            taken += 1
        if tip is not None:
            self.victims.release(tip.key)
        return taken

    def expire(self, policy: TTL) -> None:
        """Let go of everything whose time is over. A parent lives as long as its children: leaves go first."""
        while (victim := self.victims.next_victim(KIND)) is not None and policy.is_expired(victim):
            self._evict(victim)

    def _make_room(self, block: Block) -> bool:
        if self._capacity is None or len(self.victims) < self._capacity:
            return True
        victim = self.victims.next_victim(KIND)
        if victim is None or not self._admits(block, victim):
            return False
        self._evict(victim)
        return True

    def _evict(self, victim: Block) -> None:
        self.victims.evict(victim)
        self.evicted += 1


class Replay:
    """One policy at one capacity, prompt by prompt."""

    def __init__(self, policy: str, capacity: int | None, trace: CacheTrace, setting: ReplaySetting) -> None:
        self._clock, self._setting, self._block_tokens = VirtualClock(), setting, trace.block_tokens
        self.run = CacheRun(policy, capacity)
        self._oracle = Clairvoyant(trace) if policy == Clairvoyant.name else None
        self._policy: Policy = self._oracle or make_policy(policy, self._parts())
        self._ttl = self._policy if isinstance(self._policy, TTL) else None
        self._seen: set[int] = set()
        self.cache = Cache(capacity, self._policy, self._admission())

    def _admission(self) -> Admits:
        if self._oracle is not None:
            return self._oracle.admits
        return (lambda block, victim: block.key in self._seen) if self._setting.second_sight else always

    def _parts(self) -> PolicyParts:
        setting = self._setting
        return PolicyParts(self._clock, setting.cost_of, ttl_s=setting.ttl_s, half_life_s=setting.half_life_s)

    def serve(self, prompt: Prompt) -> int:
        """One request. Returns how many of its blocks were found."""
        self._clock.advance(max(0, prompt.at_ns - self._clock.now_ns()))
        if self._oracle is not None:
            self._oracle.next_request()
        if self._ttl is not None:
            self.cache.expire(self._ttl)
        found = self.cache.find(prompt.blocks)
        cached = min(found * self._block_tokens, prompt.tokens - 1)
        taken = self.cache.serve(prompt.blocks, found, cached, prompt.tokens - cached)
        if self._setting.second_sight:
            self._seen.update(block.key for block in prompt.blocks)
        self._count(prompt, found, cached, taken)
        return found

    def _count(self, prompt: Prompt, found: int, cached: int, taken: int) -> None:
        run, cost_of = self.run, self._setting.cost_of
        cold_ms = cost_of(0, prompt.tokens)
        run.blocks += len(prompt.blocks)
        run.hit_blocks += found
        run.tokens += prompt.tokens
        run.hit_tokens += cached
        run.prefill_ms += cold_ms
        run.saved_ms += cold_ms - cost_of(cached, prompt.tokens - cached)
        run.refused_blocks += len(prompt.blocks) - found - taken
        run.evicted_blocks = self.cache.evicted


def replay(trace: CacheTrace, policy: str, capacity: int | None, setting: ReplaySetting) -> CacheRun:
    """The whole trace. Raises ConfigError on an unknown policy."""
    start = time.perf_counter()
    one = Replay(policy, capacity, trace, setting)
    for prompt in trace.prompts:
        one.serve(prompt)
    one.run.seconds = time.perf_counter() - start
    return one.run
