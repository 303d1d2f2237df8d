"""Run summaries: each figure anew from the requests' own timelines; two runs side by side, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from nanovllm.core.events import BLOCK_CALLS
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.paths import Replay, replay
from nanovllm.observe.run_summary import COMPARED, compare, request_row, summary
from tests.engine.helpers import make_bench
from tests.observe.causes import MS, every, request
from tests.observe.recorded import recorded


def run_of(folder: Path, policy: str = "fcfs", tokens: int = 6, **knobs: Any) -> Replay:
    folder.mkdir()
    bench = make_bench(simulated=True, vocab_size=256, max_num_seqs=2, policy=policy, **knobs)
    return replay(recorded(bench, [(0, request(9, 60, tokens)), *every(1, 5, 8, tokens)], folder, policy=policy))


@pytest.fixture
def run(tmp_path: Path) -> Replay:
    return run_of(tmp_path / "a")


def test_latencies_and_rates_by_definition(run: Replay) -> None:
    found, times = summary(run), [path.timeline for path in run.paths.values()]
    seconds = (run.recording.end_ns - run.recording.start_ns) / 1e9
    assert found["label"] == "simulated" and found["requests"]["ends"] == {"output_complete": 6}
    assert found["tokens"] == {"prompt": 100, "output": 36}
    ttfts = sorted(t.ttft_ns / 1e6 for t in times if t.ttft_ns is not None)
    assert found["latency_ms"]["ttft"]["max"] == round(ttfts[-1], 3)
    assert found["latency_ms"]["ttft"]["mean"] == round(sum(ttfts) / 6, 3)
    assert found["latency_ms"]["itl"]["count"] == 30 and found["latency_ms"]["jitter"]["count"] == 6
    assert found["throughput"]["requests_per_s"] == pytest.approx(6 / seconds)
    assert found["throughput"]["output_tokens_per_s"] == pytest.approx(36 / seconds)
    assert found["stability"]["ttft_p99_over_p50"] == pytest.approx(ttfts[-1] / ttfts[2])


def test_goodput_counts_who_met_every_objective(run: Replay) -> None:
    limit = median(path.timeline.ttft_ns or 0 for path in run.paths.values()) / 1e6
    good = sum((path.timeline.ttft_ns or 0) <= limit * 1e6 for path in run.paths.values())
    found = summary(run, {"ttft": limit})["goodput"]
    assert 0 < good < 6 and found["requests"] == good and found["slo_ms"] == {"ttft": limit}
    assert summary(run, {"ttft": limit, "tpot": 1e-9})["goodput"]["requests"] == 0
    assert summary(run)["goodput"] is None


def test_cost_is_blocks_held_over_time(run: Replay) -> None:
    """Step by step: what was held from one launch to the next, per token."""
    header, moments = run.recording.header, [*(step.start_ns for step in run.steps), run.recording.end_ns]
    held = [header.num_blocks - step.event.free_blocks for step in run.steps]
    block_ns = sum(blocks * (end - start) for blocks, start, end in zip(held, moments, moments[1:], strict=False))
    cost = summary(run)["cost"]
    assert cost["block_seconds_per_token"] == pytest.approx(block_ns / 1e9 / 36)
    assert cost["processor_seconds_per_token"] is None, "a virtual clock uses no processor"


def test_time_in_block_calls_is_told_per_step(run: Replay) -> None:
    assert summary(run)["block_calls_ns"] is None
    for number, step in enumerate(run.steps):
        step.event = step.event._replace(block_ns=(number, 10, 0, 5))
    found, steps = summary(run)["block_calls_ns"], len(run.steps)
    assert list(found) == list(BLOCK_CALLS)
    assert found["can_allocate"] == {"mean_per_step": (steps - 1) / 2, "total": steps * (steps - 1) // 2}
    assert found["deallocate"]["total"] == 0


def test_a_row_has_the_terms_that_add_up(run: Replay) -> None:
    for path in run.paths.values():
        row = request_row(path, run.recording.header)
        assert row["ttft_ns"] == sum(row[f"t_{term}_ns"] for term in ("queue", "schedule", "prefill", "return"))
        assert row["records"] == sorted(row["records"]) and row["state"]["label"] == "estimated"
        assert row["held_ns"] == path.holds[0].length_ns > 0 and request_row(path)["state"] is None


def test_two_policies_are_set_side_by_side(tmp_path: Path) -> None:
    """The long one came first: under sjf the short ones' median falls and the longest waits longer."""
    first, second = (summary(run_of(tmp_path / policy, policy)) for policy in ("fcfs", "sjf"))
    found = compare(first, second)
    assert found["differs"] == {"policy": ["fcfs", "sjf"]} and found["remarks"] == []
    assert list(found["figures"]) == list(COMPARED) and found["labels"] == ["simulated", "simulated"]
    for row in found["figures"].values():
        if row["first"] and row["second"] is not None:
            assert row["ratio"] == row["second"] / row["first"]
    assert found["figures"]["goodput requests/s"]["ratio"] is None


def test_runs_that_cannot_be_compared_are_refused(run: Replay) -> None:
    one = summary(run)
    for field, reason in (("weights", "different models"), ("label", "One run is simulated, the other measured")):
        other = {**one, "header": {**one["header"], field: "measured"}}
        with pytest.raises(InvalidRequestError, match=reason):
            compare(one, other)
        assert compare(one, other, force=True)["figures"]["TTFT p50"]["ratio"] == 1


def test_what_makes_a_comparison_unfair_is_said(run: Replay, tmp_path: Path) -> None:
    one, other = summary(run), summary(run_of(tmp_path / "b", tokens=5))
    assert compare(one, other)["remarks"] == ["The runs did not complete the same requests: their workloads differ."]
    warm = replace(run.recording.header, prior_state="warm")
    remarks = compare(one, {**one, "header": dict(warm.__dict__)})["remarks"]
    assert remarks == ["prior state: cold in the first run, warm in the second."]


def test_an_empty_run_has_no_figures(tmp_path: Path) -> None:
    found = summary(replay(recorded(make_bench(simulated=True), [], tmp_path)))
    assert found["latency_ms"]["ttft"]["count"] == 0 and found["throughput"]["requests_per_s"] is None
    assert found["cost"]["block_seconds_per_token"] is None and found["state"]["sharing_factor"]["mean"] is None


def test_what_did_not_complete_is_counted_and_has_no_latency(tmp_path: Path) -> None:
    bench = make_bench(simulated=True)
    step = bench.engine.step

    def aborting() -> Any:
        if bench.engine.marks.num_steps == 4:
            bench.engine.abort("r0")
        return step()

    bench.engine.step = aborting  # type: ignore[method-assign]
    found = summary(replay(recorded(bench, [(0, request(0, 8, 50)), (MS, request(1, 4, 9))], tmp_path)))
    assert found["requests"]["ends"] == {"aborted": 1, "output_complete": 1}
    assert found["latency_ms"]["e2e"]["count"] == 1 and found["tokens"]["output"] == 9
