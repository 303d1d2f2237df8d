"""Golden scheduler traces: what each step of a seeded workload decided.

`python -m tests.engine.golden --write` writes tests/golden/*.jsonl anew; do that only when a
change of policy is wanted, and say why in the commit. One line a step:
{"run": [[request_id, tokens], ...], "preempted": [...], "admitted": [...]}
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.helpers import Bench, greedy, make_bench

FOLDER = Path(__file__).resolve().parent.parent / "golden"


@dataclass(frozen=True)
class Workload:
    """Requests that arrive while others run, on one engine."""

    seed: int
    knobs: dict[str, Any] = field(default_factory=dict)
    num_requests: int = 12
    prompt_lens: tuple[int, int] = (2, 30)
    outputs: tuple[int, int] = (1, 12)
    shared: int = 0  # tokens that all prompts begin with
    burst: int = 3  # at most so many arrive at one step
    arrange: Callable[[random.Random, int], dict[str, Any]] = lambda rng, i: {}


def _priorities(rng: random.Random, i: int) -> dict[str, Any]:
    return {"priority": rng.randrange(3)}


def _some_prefill_only(rng: random.Random, i: int) -> dict[str, Any]:
    return {"prefill_only": i % 3 == 0}


WORKLOADS: dict[str, Workload] = {
    "fcfs": Workload(1),
    "priority": Workload(2, {"policy": "priority", "max_num_seqs": 3}, arrange=_priorities),
    "sjf": Workload(3, {"policy": "sjf", "max_num_seqs": 3}),
    "separate": Workload(4, {"mode": "separate", "max_num_batched_tokens": 24}),
    "chunked": Workload(5, {"max_num_batched_tokens": 8, "max_prefill_chunk": 5}),
    "no_prefill_during_decode": Workload(6, {"prefill_during_decode": False}),
    "one_new_request_per_step": Workload(7, {"max_new_requests_per_step": 1}, burst=6),
    "preemption_pressure": Workload(8, {"num_blocks": 24}, prompt_lens=(2, 8), outputs=(8, 60), burst=6),
    "preemption_by_priority": Workload(
        9,
        {"num_blocks": 24, "policy": "priority"},
        prompt_lens=(2, 8),
        outputs=(8, 60),
        burst=6,
        arrange=_priorities,
    ),
    "shared_prefixes": Workload(10, {"num_blocks": 24}, shared=13, burst=5),
    "prefill_only_mixed": Workload(11, {"max_num_batched_tokens": 12, "num_blocks": 24}, arrange=_some_prefill_only),
    "block_size_1": Workload(12, {"block_size": 1, "num_blocks": 90}, shared=6),
    "watermark": Workload(13, {"num_blocks": 20, "watermark_blocks": 3}, outputs=(8, 24)),
}


def trace(workload: Workload) -> list[dict[str, Any]]:
    """The decisions of each step."""
    rng = random.Random(workload.seed)
    bench = make_bench(simulated=True, vocab_size=256, **{"num_blocks": 64, **workload.knobs})
    shared = [rng.randrange(256) for _ in range(workload.shared)]
    to_come = [_request(rng, workload, shared, i) for i in range(workload.num_requests)]
    steps = []
    while to_come or not bench.engine.is_finished():
        for _ in range(min(rng.randrange(workload.burst + 1), len(to_come))):
            bench.engine.add_request(**to_come.pop(0))
        steps.append(_decisions(bench))
    return steps


def _request(rng: random.Random, workload: Workload, shared: list[int], i: int) -> dict[str, Any]:
    prompt = [*shared, *(rng.randrange(256) for _ in range(rng.randint(*workload.prompt_lens)))]
    params = greedy(rng.randint(*workload.outputs))
    return {"prompt": prompt, "sampling_params": params, "request_id": f"r{i}", **workload.arrange(rng, i)}


def _decisions(bench: Bench) -> dict[str, Any]:
    """One step, as who runs how many tokens, who was preempted and who came in."""
    chosen: list[list[Any]] = []
    schedule = type(bench.scheduler).schedule

    def watch() -> Any:
        batch = schedule(bench.scheduler)
        chosen.extend([seq.request_id, seq.num_scheduled_tokens] for seq in batch.seqs)
        return batch

    bench.scheduler.schedule = watch  # type: ignore[method-assign]
    reader = bench.engine.events.reader()
    bench.step()
    events = [(e.stage, e.request_id) for e in reader.poll() if hasattr(e, "stage")]
    return {
        "run": chosen,
        "preempted": [request_id for stage, request_id in events if stage == "preempted"],
        "admitted": [request_id for stage, request_id in events if stage == "scheduled"],
    }


def as_text(steps: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(step) + "\n" for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the traces anew")
    for name, workload in WORKLOADS.items():
        path = FOLDER / f"{name}.jsonl"
        text = as_text(trace(workload))
        if parser.parse_args().write:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        same = path.exists() and path.read_text(encoding="utf-8") == text
        print(f"{name:28} {len(text.splitlines()):4} steps  {'same' if same else 'DIFFERS'}")


if __name__ == "__main__":
    main()
