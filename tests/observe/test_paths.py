"""Paths: a recording gives back the engine's own timelines, whatever happened in the run."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.observe.paths import Replay, holding_changes, replay
from nanovllm.observe.recording import read_recording
from nanovllm.observe.statistics import Level, levels, time_mean
from tests.engine.fakes import FakeStatePlane, Load
from tests.engine.helpers import greedy, make_bench
from tests.observe.recorded import record, recorded


def request(name: str, length: int, tokens: int, **more: Any) -> dict[str, Any]:
    options = {"n": more.pop("n")} if "n" in more else {}
    return {"prompt": [length] * length, "sampling_params": greedy(tokens, **options), "request_id": name, **more}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 25), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=7
    ),
    st.sampled_from(["mixed", "separate"]),
    st.sampled_from([None, 3, 7]),
    st.integers(12, 40),
)
def test_a_recording_gives_back_the_engines_timelines(
    work: list[tuple[int, int, int, int]], mode: str, chunk: int | None, num_blocks: int
) -> None:
    bench = make_bench(num_blocks=num_blocks, simulated=True, mode=mode, max_prefill_chunk=chunk, vocab_size=256)
    requests = [(at * 10**6, request(f"r{i}", length, tokens, n=n)) for i, (at, length, tokens, n) in enumerate(work)]
    with TemporaryDirectory() as folder:
        finals = record(bench, requests, Path(folder) / "run.jsonl")
        found = replay(read_recording(Path(folder) / "run.jsonl"))
    kept = {
        request_id + (f"[{i}]" if i else ""): completion.timeline
        for request_id, final in finals.items()
        for i, completion in enumerate(final.completions)
    }
    assert set(found.paths) == set(kept)
    for name, path in found.paths.items():
        path.timeline.released_ns = kept[name].released_ns  # told when it was handed over, kept when it happened
        assert path.timeline == kept[name]
        assert path.end == "output_complete" and path.timeline.as_dict() == kept[name].as_dict()
        assert sum(span.length_ns for span in path.holds) >= sum(span.length_ns for span in path.prefills)
    check_steps(found)


def check_steps(found: Replay) -> None:
    """Each step's members are those it ran: the batch is complete and its prompt tokens add up."""
    for step in found.steps:
        assert len(step.members) == step.event.batch_size
        assert sum(member.prefill_tokens for member in step.members.values()) == step.event.prefill_tokens
        assert step.end_ns > step.start_ns


def test_live_requests_are_those_that_hold_blocks(tmp_path: Path) -> None:
    """At each launch the recording's levels are the engine's own counter."""
    bench = make_bench(num_blocks=16, simulated=True, max_prefill_chunk=6)
    counted: list[tuple[int, int]] = []
    launch = bench.runner.launch

    def counting(batch: Any) -> Any:
        count = bench.scheduler.count_state()
        counted.append((count.live_requests, count.prefilling_requests))
        return launch(batch)

    bench.runner.launch = counting
    requests = [(0, request(f"r{i}", 14, 3, prompt=[i] * 14)) for i in range(5)]
    found = replay(recorded(bench, requests, tmp_path))
    live = levels(holding_changes(list(found.paths.values())))
    prefilling = levels(holding_changes(list(found.paths.values()), prefilling=True))
    at = [step.start_ns for step in found.steps]
    assert counted == [(level_at(live, moment), level_at(prefilling, moment)) for moment in at]
    assert len(set(counted)) > 2 and live[-1].amount == prefilling[-1].amount == 0
    end_ns = found.recording.end_ns
    assert 0 < (time_mean(prefilling, 0, end_ns) or 0) < (time_mean(live, 0, end_ns) or 0) < 5


def level_at(series: list[Level], moment: int) -> float:
    return [level.amount for level in series if level.at_ns <= moment][-1]


def test_a_load_of_state_is_t_state(tmp_path: Path) -> None:
    bench = make_bench(simulated=True, kv=lambda device, runner: FakeStatePlane(device, lambda seq: Load(delay=3)))
    bench.engine.add_request([1] * 10, greedy(2), request_id="other")
    step = bench.engine.step

    def slow() -> Any:
        bench.clock.advance(10**6)
        return step()

    bench.engine.step = slow  # type: ignore[method-assign]
    finals = record(bench, [(0, request("r", 14, 3))], tmp_path / "run.jsonl")
    path = replay(read_recording(tmp_path / "run.jsonl")).paths["r"]
    assert path.timeline.state_wait_ns == finals["r"].timeline.state_wait_ns > 0


def test_an_id_that_comes_again_is_a_new_path(tmp_path: Path) -> None:
    bench = make_bench(simulated=True)
    found = replay(recorded(bench, [(0, request("r", 5, 2)), (10**9, request("r", 6, 2))], tmp_path))
    assert {name: path.prompt_len for name, path in found.paths.items()} == {"r": 5, "r#2": 6}


def test_what_was_found_in_the_cache_is_seen(tmp_path: Path) -> None:
    bench = make_bench(simulated=True)
    found = replay(recorded(bench, [(0, request("a", 10, 2)), (10**9, request("b", 10, 2))], tmp_path))
    assert (found.paths["a"].cached_tokens, found.paths["b"].cached_tokens) == (0, 8)


def test_an_aborted_and_a_rejected_request_end_where_they_ended(tmp_path: Path) -> None:
    bench = make_bench(simulated=True)
    after: list[str] = ["r"]
    step = bench.engine.step

    def aborting() -> Any:
        outputs = step()
        if bench.engine.marks.num_steps == 3 and after:
            bench.engine.abort(after.pop())
        return outputs

    bench.engine.step = aborting  # type: ignore[method-assign]
    path = replay(recorded(bench, [(0, request("r", 5, 50))], tmp_path)).paths["r"]
    assert path.end == "aborted" and path.timeline.end_to_end_ns is None and path.timeline.ttft_ns
    assert len(path.holds) == 1
