"""What experiment 4 runs: three cases, three arms, so many repeats, in which order.

What it is: sizes and the plan. What it knows nothing about: engines and results.
Invariants: `base` has one block count for all cases; the other arms change the block
count and nothing else; every request of a run is made from its case, the size and the seed alone; every second
repeat goes through the same runs backwards.

    base    the observation: short_ctx, long_ctx and mixed_ctx on one fixed pool, too small for long contexts
    roomy   the intervention: the same requests on a pool that holds all of them at once, so that no one waits for it
    tight   the reverse: short_ctx, for which `base` is no wall, on a pool as small beside it as `base` is for long_ctx
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.lab.workloads import Knobs, Workload, generate

CASES = ("short_ctx", "long_ctx", "mixed_ctx")
ARMS = ("base", "roomy", "tight")
RUNS = (*(("base", case) for case in CASES), *(("roomy", case) for case in CASES), ("tight", "short_ctx"))
MIN_REPEATS = 3
LAB_VERSION = 3  # of the plan, the criteria and the wording: a bundle is checked by the version that made it
WARMUP = "one request of either length on the roomy pool, not recorded"
BLOCK_SIZE = 16
SHARED_LEN = 32  # all prompts begin with one system prompt: something for an observe-only probe to see
ENGINE = {  # one prompt a step, whole: T_prefill is then one step's time, whoever else is there
    "block_size": BLOCK_SIZE,
    "prefix_mode": "observe",
    "policy": "fcfs",
    "schedule_mode": "mixed",
    "max_new_requests_per_step": 1,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "watermark": 0.0,
}


@dataclass(frozen=True)
class Size:
    """Lengths in tokens, pools in blocks. `concurrency` clients ask one after another."""

    short_len: int
    long_len: int
    output_len: int
    requests: int
    concurrency: int
    base_blocks: int
    tight_blocks: int
    roomy_blocks: int

    def pool(self, arm: str) -> int:
        """The block count of an arm."""
        return int(getattr(self, f"{arm}_blocks"))

    def knobs(self, case: str, seed: int, vocab: int) -> Knobs:
        """What the requests of a case are made from."""
        return Knobs(
            seed=seed,
            sessions=self.requests,
            concurrency=self.concurrency,
            shared_len=SHARED_LEN,
            length=(self.long_len if case == "long_ctx" else self.short_len) - SHARED_LEN,
            long_len=self.long_len - SHARED_LEN,
            long_share=0.5 if case == "mixed_ctx" else 0.0,
            spread=0.0,
            output_len=self.output_len,
            vocab=vocab,
        )

    def workload(self, case: str, seed: int, vocab: int) -> Workload:
        """The requests of a case."""
        return generate(case, self.knobs(case, seed, vocab))


FULL = Size(64, 512, 40, 16, 8, base_blocks=112, tight_blocks=24, roomy_blocks=320)
QUICK = Size(48, 160, 20, 8, 4, base_blocks=28, tight_blocks=13, roomy_blocks=64)


def size_of(manifest: Mapping[str, Any]) -> Size:
    """The size that a bundle's manifest names."""
    return QUICK if manifest.get("quick") is True else FULL


@dataclass(frozen=True)
class PlannedRun:
    """One run: its place in the order, from 1, and its part of the experiment."""

    position: int
    arm: str
    case: str
    repeat: int

    @property
    def name(self) -> str:
        """As it stands in tables, and as the stem of its recording."""
        return f"{self.position:02d}-{self.arm}-{self.case}-{self.repeat}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"run": self.name, **vars(self)}


def plan(repeats: int) -> list[PlannedRun]:
    """Every run in order: each second repeat backwards, so that a drift of the machine hits both arms alike."""
    found: list[PlannedRun] = []
    for repeat in range(1, repeats + 1):
        for arm, case in RUNS if repeat % 2 else reversed(RUNS):
            found.append(PlannedRun(len(found) + 1, arm, case, repeat))
    return found
