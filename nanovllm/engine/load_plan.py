"""LoadPlan: what of a prefix lies in lower tiers, and whether bringing it up is cheaper than computing it.

What it is: the decision before a load, as data that a receipt shows. What it knows nothing about: moving
bytes, block ids. Invariants: looking changes nothing and touches no disk; both estimates are in the plan
whatever was decided; where the cost of computing is not known yet, the load is tried.

Of one tier it is all or nothing: a token costs more to compute the more stand before it, and the same to load, so
what loading saves a token grows along the prefix. Where the tier changes, the rest may be worth computing instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nanovllm.config import STATE_LOADS
from nanovllm.core.digest import Digest
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_costs import StepCosts
from nanovllm.state.objects import KVBlock
from nanovllm.state.plane import Plane

AUTO, ALWAYS, NEVER = STATE_LOADS
ASK_SHARE, MIN_ASK_MS = 0.25, 20.0  # of what computing would take; a thread is woken within it on a busy machine


@dataclass(frozen=True)
class LoadPlan:
    """Blocks in order, the tier each would come from, and the two estimates in milliseconds."""

    blocks: tuple[KVBlock, ...]
    tiers: tuple[str, ...]
    size_bytes: int
    load_ms: float
    load_label: str
    compute_ms: float | None
    is_worth_it: bool
    reason: str

    @property
    def digests(self) -> list[Digest]:
        """Of the blocks."""
        return [block.digest for block in self.blocks]

    def detail(self, seq: Sequence, num_loaded: int) -> dict[str, Any]:
        """For the receipt."""
        return {
            "request_id": seq.request_id,
            "tokens": sum(len(block.token_ids) for block in self.blocks),
            "loaded_tokens": sum(len(block.token_ids) for block in self.blocks[:num_loaded]),
            "estimated_load_ms": self.load_ms,
            "load_speed": self.load_label,
            "estimated_compute_ms": self.compute_ms,
            "decision": self.reason,
        }


def blocks_below(plane: Plane, blocks: list[KVBlock]) -> tuple[str, ...]:
    """The fastest lower tier of each block, up to the first that lies in none."""
    tiers: list[str] = []
    for block in blocks:
        entry = plane.catalog.entries.get(block.digest)
        known = entry is not None and entry.label.layout == plane.layout
        name = next((n for n, p in plane.places.items() if entry is not None and known and p.can_give(entry)), None)
        if name is None:
            break
        tiers.append(name)
    return tuple(tiers)


def plan_load(
    plane: Plane, blocks: list[KVBlock], tiers: tuple[str, ...], cached: int, new: int, costs: StepCosts, mode: str
) -> LoadPlan:
    """Whether to bring up `blocks`: `cached` tokens are on the device, `new` would have to be computed."""
    ends = [i for i in range(1, len(tiers) + 1) if i == len(tiers) or tiers[i] != tiers[i - 1]] or [0]
    options = [_plan(plane, blocks[:end], tiers[:end], cached, new, costs, mode) for end in ends]
    if mode != AUTO or not costs.is_known:
        return options[-1]
    best = max(options, key=lambda plan: (plan.compute_ms or 0.0) - plan.load_ms)
    return best if best.is_worth_it else options[-1]


def count_load(plane: Plane, plan: LoadPlan, num_loaded: int) -> None:
    """Every block of a plan, counted under its own tier and kind: it came, it did not, or nobody went for it."""
    for i, (block, tier) in enumerate(zip(plan.blocks, plan.tiers, strict=True)):
        outcome = "load_refused" if not plan.is_worth_it else "loaded" if i < num_loaded else "not_loaded"
        plane.places[tier].tally.wanted(plane.catalog.kind_of(block.digest), outcome)


def ask_ms(cached: int, new: int, costs: StepCosts, mode: str) -> float:
    """How long to wait for a shared tier to say what it has: asking may not cost much of what it could save."""
    return max(MIN_ASK_MS, ASK_SHARE * costs.ms(cached, new)) if mode == AUTO and costs.is_known else math.inf


def _plan(
    plane: Plane, found: list[KVBlock], tiers: tuple[str, ...], cached: int, new: int, costs: StepCosts, mode: str
) -> LoadPlan:
    """What bringing up just these would cost and save."""
    sizes = [plane.catalog.entries[block.digest].size_bytes for block in found]
    load_ms = sum(plane.places[tier].read_speed.ms(size) for tier, size in zip(tiers, sizes, strict=True))
    labels = {plane.places[tier].read_speed.label for tier in tiers}
    loaded = sum(len(block.token_ids) for block in found)
    compute_ms = None
    if costs.is_known:
        compute_ms = costs.ms(cached, new) - costs.ms(cached + loaded, new - loaded)
    worth, reason = _decide(mode, load_ms, compute_ms)
    label = "measured" if labels == {"measured"} else "estimated"
    return LoadPlan(tuple(found), tiers, sum(sizes), load_ms, label, compute_ms, worth, reason)


def _decide(mode: str, load_ms: float, compute_ms: float | None) -> tuple[bool, str]:
    if mode != AUTO:
        return mode == ALWAYS, f"state_load is {mode}"
    if compute_ms is None:
        return True, "what computing costs is not known yet"
    if load_ms < compute_ms:
        return True, "loading is cheaper"
    return False, "computing is cheaper"
