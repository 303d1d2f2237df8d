"""Workloads carried out: on the virtual clock to the nanosecond, and on a real engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.clock import MonotonicClock, VirtualClock
from nanovllm.core.cost_table import CostTable
from nanovllm.core.events import StepEvent
from nanovllm.lab.simulated import simulated_engine
from nanovllm.lab.workload_run import WorkloadRun, run_workload, wait_until
from nanovllm.lab.workload_stats import overlap
from nanovllm.lab.workloads import SETTINGS, Workload, generate
from nanovllm.observe.probe import PrefixProbe, total

SMALL = {"sessions": 6, "length": 20, "output_len": 6}


def simulate(workload: Workload, num_blocks: int = 512, **engine_settings: Any) -> WorkloadRun:
    return run_workload(simulated_engine(num_blocks, **engine_settings), workload)


def spans(workload: Workload, run: WorkloadRun) -> dict[str, tuple[int, int]]:
    """Arrival and end of each session."""
    found: dict[str, tuple[int, int]] = {}
    for request in workload.requests:
        t = run.finals[request.request_id].timeline
        first = found.get(request.session, (t.arrival_ns, 0))[0]
        assert t.last_handover_ns is not None
        found[request.session] = (first, t.last_handover_ns)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_the_plan_and_twice_the_same(name: str) -> None:
    workload = generate(name, **SMALL)
    run, again = simulate(workload), simulate(workload)
    assert {i: final.prompt_len for i, final in run.finals.items()} == workload.prompt_lens()
    assert all(len(run.finals[r.request_id].token_ids) == r.output_len for r in workload.requests)
    assert not run.refused and not run.skipped
    as_data = [[(i, f.token_ids, f.timeline.as_dict()) for i, f in r.finals.items()] for r in (run, again)]
    assert as_data[0] == as_data[1] and run.end_ns == again.end_ns


def test_open_loop_arrivals_are_kept_even_inside_a_step() -> None:
    workload = generate("bursty", sessions=30, rate=200.0)
    run = simulate(workload, max_num_seqs=2)
    late = 0
    for request in workload.requests:
        t = run.finals[request.request_id].timeline
        assert t.arrival_ns == request.arrival_ns
        late += t.queued_ns > t.arrival_ns
    assert late > 10  # they came while a step was under way, and that time belongs to their queue


def test_turns_follow_after_thinking() -> None:
    workload = generate("multi_turn", **SMALL)
    run = simulate(workload)
    for request in workload.requests:
        if request.after is not None:
            before, this = run.finals[request.after], run.finals[request.request_id]
            assert this.timeline.arrival_ns == before.timeline.last_handover_ns + 500 * 10**6
            history = before.prompt_token_ids + before.token_ids
            assert this.prompt_token_ids[: len(history)] == history
            assert this.segments[0].name == "history" and this.segments[0].end == len(history)


@given(concurrency=st.integers(1, 4), turns=st.integers(1, 3), seed=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_a_closed_loop_has_exactly_so_many_sessions_under_way(concurrency: int, turns: int, seed: int) -> None:
    workload = generate("short_ctx", sessions=7, turns=turns, concurrency=concurrency, seed=seed, output_len=4)
    found = spans(workload, simulate(workload))
    for start, _ in found.values():
        assert sum(begin <= start < end for begin, end in found.values()) <= concurrency
    assert sum(begin == 0 for begin, _ in found.values()) == concurrency


def test_longer_contexts_leave_room_for_fewer() -> None:
    """What the workloads are for: one pool, short and long contexts."""
    most = {}
    for name in ("short_ctx", "long_ctx"):
        engine = simulated_engine(256)
        run_workload(engine, generate(name, output_len=8))
        events = engine.events.reader(from_start=True).poll()
        most[name] = max(event.running_size for event in events if isinstance(event, StepEvent))
    assert most["short_ctx"] == 16 > 2 * most["long_ctx"]


def test_what_is_refused_takes_its_turns_with_it_and_frees_its_place() -> None:
    """Session 0 is too long for the pool from the second turn on; the closed loop goes on behind it."""
    workload = generate("multi_turn", sessions=3, turns=3, concurrency=1, length=40, spread=0.0, shared_len=0)
    run = simulate(workload, num_blocks=8, block_size=16)  # 128 tokens: turn 0 has 40 + 32, turn 1 112, turn 2 184
    assert sorted(run.finals) == sorted(f"s{s}-t{t}" for s in range(3) for t in range(2))
    assert sorted(run.refused) == [f"s{s}-t2" for s in range(3)]
    tight = simulate(workload, num_blocks=6, block_size=16)
    assert sorted(tight.refused) == [f"s{s}-t1" for s in range(3)]
    assert sorted(tight.skipped) == [f"s{s}-t2" for s in range(3)]


def test_labs_observe_unless_they_ask_for_reuse() -> None:
    """The plan's probe, the probe beside the run and the engine's own count speak of the same overlap."""
    workload = generate("multi_turn", concurrency=1, **SMALL)
    engine, probe = simulated_engine(1024), PrefixProbe()
    engine.observers.add(probe)
    run = run_workload(engine, workload)
    assert sum(final.cached_tokens for final in run.finals.values()) == 0
    potential = sum(final.potential_cached_tokens for final in run.finals.values())
    figure = total(probe.figures(), 16)
    assert figure.overlap_tokens == potential == total(overlap(workload, 16), 16).overlap_tokens > 0
    reused = simulate(workload, 1024, prefix_mode="reuse")
    assert sum(final.cached_tokens for final in reused.finals.values()) == potential


def test_time_is_the_cost_tables() -> None:
    costs = CostTable(base_ms=2.0)
    run = run_workload(simulated_engine(64, costs=costs), generate("short_ctx", sessions=1, output_len=5, spread=0))
    assert run.end_ns == 5 * 2 * 10**6
    assert run.finals["s0-t0"].timeline.label == "simulated"


def test_waiting_is_the_clocks_business() -> None:
    virtual, real = VirtualClock(5), MonotonicClock()
    wait_until(virtual, 3)
    assert virtual.now_ns() == 5
    wait_until(virtual, 9)
    assert virtual.now_ns() == 9
    due = real.now_ns() + 2_000_000
    wait_until(real, due)
    assert real.now_ns() >= due


def test_a_real_engine_serves_the_same_plan() -> None:
    from nanovllm import LLM

    workload = generate("multi_turn", sessions=2, turns=2, length=10, output_len=3, think_ms=1)
    with LLM("tiny:random", num_blocks=64, progress=False) as llm:
        run = run_workload(llm.engine, workload)
    assert {i: final.prompt_len for i, final in run.finals.items()} == workload.prompt_lens()
    assert all(final.timeline.label == "measured" for final in run.finals.values())
