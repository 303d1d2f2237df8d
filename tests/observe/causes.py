"""Workloads built to have one cause each, or two, or none: simulated, so every nanosecond is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from nanovllm.observe.paths import Replay, replay
from tests.engine.fakes import FakeStatePlane, Load
from tests.engine.helpers import Bench, greedy, make_bench
from tests.observe.recorded import recorded

MS = 10**6
DELAY = 30 * MS
Arrivals = list[tuple[int, dict[str, Any]]]


def request(i: int, length: int, tokens: int, prefix: int = 0, **more: Any) -> dict[str, Any]:
    """A prompt that shares nothing with the others but `prefix` tokens."""
    own = [(7 * i + j) % 250 for j in range(length - prefix)]
    own[:1] = [i % 256]
    return {
        "prompt": [255] * prefix + own,
        "sampling_params": greedy(tokens),
        "request_id": f"r{i}",
        **more,
    }


def every(gap_ms: float, count: int, length: int, tokens: int, first: int = 0, at_ms: float = 0) -> Arrivals:
    return [(int((at_ms + i * gap_ms) * MS), request(first + i, length, tokens)) for i in range(count)]


def slow_hand_over(bench: Bench) -> None:
    """What lies behind the engine is slow: each hand-over takes DELAY."""
    take = bench.engine.book.take

    def slow(seq: Any) -> Any:
        bench.clock.advance(DELAY)
        return take(seq)

    bench.engine.book.take = slow  # type: ignore[method-assign]


def slow_steps(bench: Bench) -> None:
    """The machine is busy: every fourth step takes DELAY longer."""
    launch, numbers = bench.runner.launch, count()

    def slow(batch: Any) -> Any:
        handle = launch(batch)
        bench.clock.advance(DELAY if next(numbers) % 4 == 3 else 0)
        return handle

    bench.runner.launch = slow


def slow_tokenizer(bench: Bench) -> None:
    """A text takes ten times DELAY to become tokens."""
    tokenizer = bench.engine.parts.tokenizer
    encode = tokenizer.encode

    def slow(*arguments: Any, **options: Any) -> Any:
        bench.clock.advance(10 * DELAY)
        return encode(*arguments, **options)

    tokenizer.encode = slow  # type: ignore[method-assign]


def slow_loads(bench: Bench) -> None:
    """While state is being loaded, each look at it takes DELAY."""
    step = bench.engine.step

    def slow() -> Any:
        bench.clock.advance(DELAY if bench.scheduler.loading else 0)
        return step()

    bench.engine.step = slow  # type: ignore[method-assign]


@dataclass(frozen=True)
class Built:
    """Requests, the engine they meet, and the causes that the diagnosis must name, largest first."""

    arrivals: Arrivals
    causes: tuple[str, ...]
    knobs: dict[str, Any] = field(default_factory=dict)
    request: str | None = None  # whose diagnosis is asked; the whole run's where None
    behind: str | None = None
    arrange: Callable[[Bench], None] = lambda bench: None

    def run(self, folder: Path) -> Replay:
        bench = make_bench(simulated=True, vocab_size=256, **{"num_blocks": 512, **self.knobs})
        self.arrange(bench)
        header = {"policy": self.knobs["policy"]} if "policy" in self.knobs else {}
        return replay(recorded(bench, self.arrivals, folder, **header))


ALONE = every(120, 5, 8, 60)  # each has the engine to itself
WALL: dict[str, Any] = {"num_blocks": 112, "block_size": 16}  # three prompts of 512 tokens
BIG_HEAD = [(0, request(0, 40, 60)), (5 * MS, request(1, 80, 4)), (6 * MS, request(2, 4, 4))]
ONE_CAUSE: dict[str, Built] = {
    "healthy": Built(ALONE, ()),
    "healthy_together": Built(every(20, 8, 8, 40), ()),
    "batch_cap": Built(every(30, 10, 8, 40), ("batch_cap",), {"max_num_seqs": 1}),
    "all_at_once": Built(every(0, 24, 8, 20), ("batch_cap",), {"max_num_seqs": 2}),  # no rate to keep up with
    "token_budget": Built(every(20, 12, 120, 2), ("token_budget",), {"max_num_batched_tokens": 16}),
    "admission_cap": Built(every(3, 12, 60, 2), ("admission_cap",), {"max_new_requests_per_step": 1}),
    "policy_knob": Built(
        [(0, request(0, 8, 200)), *every(5, 3, 8, 4, first=1, at_ms=5)], ("policy",), {"prefill_during_decode": False}
    ),
    "policy_order": Built(
        [(0, request(0, 10, 20)), (1, request(1, 60, 4)), *every(15, 12, 8, 20, first=2, at_ms=2)],
        ("policy",),
        {"policy": "sjf", "max_num_seqs": 1},
        request="r1",
    ),
    "head_of_line": Built(BIG_HEAD, ("head_of_line",), {"num_blocks": 28}, request="r2", behind="r1"),
    "blocks_exhausted": Built(
        every(20, 10, 60, 60), ("blocks_exhausted",), {"num_blocks": 32}, request="r1", behind="r0"
    ),
    "fragmentation": Built(every(10, 16, 4, 30), ("fragmentation",), {"num_blocks": 4, "block_size": 128}),
    "reservation": Built(every(5, 10, 20, 40), ("reservation",), {"num_blocks": 64, "watermark_blocks": 44}),
    "preemption": Built(every(0, 2, 8, 70), ("preemption",), {"num_blocks": 22}, request="r1", behind="r0"),
    "admission_cap_before_the_wall": Built(  # blocks are short for those behind it
        every(0, 10, 60, 2), ("admission_cap",), {"max_new_requests_per_step": 1, "num_blocks": 72}, request="r3"
    ),
    "admission_cap_of_a_deep_queue": Built(  # it lets one in where one leaves; the wall is met now and then
        [(0, request(i, 60, 40 if i in (70, 71) else 10)) for i in range(100)],
        ("admission_cap",),
        {"max_new_requests_per_step": 1, "max_num_seqs": 16, "num_blocks": 54, "block_size": 16},
    ),
    "prefill": Built(every(300, 4, 400, 4), ("prefill",)),
    "prefill_of_others": Built(
        [(0, request(0, 8, 40)), *every(30, 12, 200, 2, first=1, at_ms=3)], ("prefill_of_others",), request="r0"
    ),
    "decode": Built([(0, request(99, 4, 60)), *every(0, 24, 4, 60, at_ms=100)], ("decode",), request="r5"),
    "uneven_steps": Built(ALONE, ("uneven_steps",), arrange=slow_steps),
    "output": Built(ALONE, ("output",), arrange=slow_hand_over),
    "intake": Built(
        [(at, {**one, "prompt": "eight by"}) for at, one in every(700, 4, 8, 20)], ("intake",), arrange=slow_tokenizer
    ),
    "state_load": Built(
        every(900, 4, 40, 10),
        ("state_load",),
        {"kv": lambda device, runner: FakeStatePlane(device, lambda seq: Load(delay=15))},
        arrange=slow_loads,
    ),
    "long_step": Built([(0, request(0, 900, 2)), (MS, request(1, 4, 2))], ("long_step",), request="r1", behind="r0"),
    "producer": Built(
        [(0, request(0, 300, 4, prefix=296)), (0, request(1, 300, 4, prefix=296))],
        ("producer",),
        {"max_prefill_chunk": 32},
        request="r1",
        behind="r0",
    ),
}

TWO_CAUSES: dict[str, Built] = {
    "cap_and_blocks_at_once": Built(  # three fit, and three are allowed: neither is the cause alone
        every(0, 12, 512, 40), ("batch_cap", "blocks_exhausted"), {**WALL, "max_num_seqs": 3}
    ),
    "burst_and_cap": Built(
        [*every(0, 24, 8, 20), *every(0, 24, 8, 20, first=30, at_ms=8000)],
        ("batch_cap", "arrival_burst"),
        {"max_num_seqs": 2},
    ),
    "cap_and_prefill": Built(every(65, 6, 300, 10), ("prefill", "batch_cap"), {"max_num_seqs": 1}),
    "blocks_and_hand_over": Built(
        every(200, 4, 60, 12), ("output", "blocks_exhausted"), {"num_blocks": 20}, arrange=slow_hand_over
    ),
    "cap_and_blocks": Built(
        [*every(15, 12, 8, 40), *every(20, 7, 60, 40, first=20, at_ms=3000)],
        ("blocks_exhausted", "batch_cap"),
        {"max_num_seqs": 2, "num_blocks": 28},
    ),
    "prefill_of_others_and_output": Built(
        [(0, request(0, 8, 20)), *every(60, 30, 260, 1, first=1, at_ms=3)],
        ("prefill_of_others", "output"),
        request="r0",
        arrange=slow_hand_over,
    ),
}
