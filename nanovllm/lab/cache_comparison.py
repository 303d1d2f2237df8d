"""Policies against capacities on one trace: the runs, the bounds beside them, one document.

What it is: the loop over both, and its result as plain data. What it knows nothing about: how it is shown.
Invariants: every run starts from an empty cache; the infinite cache is always there; the document says how each
figure came about: hits are simulated, milliseconds come from a cost table that is named with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ConfigError
from nanovllm.lab.cache_replay import LABEL, CacheRun, ReplaySetting, replay
from nanovllm.lab.cache_trace import CacheTrace
from nanovllm.lab.clairvoyant import Clairvoyant
from nanovllm.state.policies.lru import LRU
from nanovllm.state.policies.registry import POLICIES

ALL_POLICIES = (*POLICIES, Clairvoyant.name)
SHARES = (0.01, 0.03, 0.1, 0.2, 0.4)  # of the distinct blocks: the capacities where none are asked for
STATEMENT = (
    "Each prompt is served the instant it comes; hits overstate what a busy server reuses. "
    "The clairvoyant maximises hit blocks, not milliseconds."
)


@dataclass(frozen=True)
class Comparison:
    """`runs` by capacity, then by policy; `infinite` is what no capacity can exceed."""

    trace: CacheTrace
    setting: ReplaySetting
    infinite: CacheRun
    runs: tuple[CacheRun, ...]

    @property
    def capacities(self) -> list[int]:
        """In blocks, ascending."""
        return sorted({run.capacity_blocks for run in self.runs if run.capacity_blocks is not None})

    @property
    def policies(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(run.policy for run in self.runs))

    def run(self, policy: str, capacity: int) -> CacheRun:
        """That one. Raises StopIteration where it was not asked for."""
        return next(run for run in self.runs if (run.policy, run.capacity_blocks) == (policy, capacity))

    def as_dict(self) -> dict[str, Any]:
        """The document."""
        costs = self.setting.costs
        return {
            "label": LABEL,
            "statement": STATEMENT,
            "trace": self.trace.as_dict(),
            "costs": {
                "label": "estimated",
                "base_ms": costs.base_ms,
                "per_new_ms": costs.per_new_ms,
                "per_pair_ms": costs.per_pair_ms,
            },
            "ttl_s": self.setting.ttl_s,
            "half_life_s": self.setting.half_life_s,
            "second_sight": self.setting.second_sight,
            "infinite": self.infinite.as_dict(),
            "runs": [run.as_dict() for run in self.runs],
        }


def check_policies(names: Iterable[str]) -> None:
    """Raises ConfigError on a name that is neither a policy nor the reference."""
    for name in names:
        if name not in ALL_POLICIES:
            hint = f"There are {', '.join(ALL_POLICIES)}."
            raise ConfigError(f"There is no policy {name!r}.", param="policy", hint=hint)


def default_capacities(trace: CacheTrace) -> list[int]:
    """Blocks: some shares of what the trace has."""
    return sorted({max(1, round(share * trace.num_distinct)) for share in SHARES})


def compare(
    trace: CacheTrace,
    setting: ReplaySetting,
    policies: Sequence[str],
    capacities: Sequence[int],
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run them all. `progress` is told of each before it starts."""
    check_policies(policies)
    progress("infinite cache")
    infinite = replay(trace, LRU.name, None, setting)
    infinite.policy = "infinite"
    runs = []
    for capacity in sorted(set(capacities)):
        for policy in dict.fromkeys(policies):
            progress(f"{policy}, {capacity:,} blocks")
            runs.append(replay(trace, policy, capacity, setting))
    return Comparison(trace, setting, infinite, tuple(runs))
