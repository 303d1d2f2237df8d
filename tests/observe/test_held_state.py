"""Held state: levels and sizes read off a recording are those the engine's own counter and tables had."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.observe.held_state import last_state, state_summary, table_entries, used_blocks
from nanovllm.observe.paths import replay
from nanovllm.observe.recording import read_recording
from nanovllm.observe.statistics import Level
from tests.engine.helpers import Bench, greedy, make_bench
from tests.observe.causes import MS, request
from tests.observe.recorded import record, recorded


def at(series: list[Level], moment: int) -> float:
    return [0.0, *(level.amount for level in series if level.at_ns <= moment)][-1]


def count_launches(bench: Bench) -> list[tuple[int, int]]:
    """From now on (table entries, used blocks) at each launch, as the engine counts them."""
    counted: list[tuple[int, int]] = []
    launch = bench.runner.launch

    def counting(batch: Any) -> Any:
        count = bench.scheduler.count_state()
        counted.append((sum(held.blocks for held in count.held), count.used_blocks))
        return launch(batch)

    bench.runner.launch = counting
    return counted


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 25), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(10, 40),
    st.sampled_from([None, 5]),
    st.booleans(),
)
def test_levels_are_the_engines_own_counts(
    work: list[tuple[int, int, int]], num_blocks: int, chunk: int | None, is_shared: bool
) -> None:
    bench = make_bench(num_blocks=num_blocks, simulated=True, vocab_size=256, max_prefill_chunk=chunk)
    counted = count_launches(bench)
    arrivals = [
        (when * MS, request(i, length, tokens, prefix=length - 1 if is_shared else 0))
        for i, (when, length, tokens) in enumerate(work)
    ]
    with TemporaryDirectory() as folder:
        record(bench, arrivals, Path(folder) / "run.jsonl")
        run = replay(read_recording(Path(folder) / "run.jsonl"))
    entries, used = table_entries(run), used_blocks(run)
    found = [(at(entries, step.start_ns), at(used, step.start_ns)) for step in run.steps]
    assert found == counted
    assert entries[-1].amount == used[-1].amount == 0


def test_the_last_state_of_a_request_is_what_it_gave_back(tmp_path: Path) -> None:
    bench = make_bench(simulated=True, num_blocks=64)
    given_back: dict[str, tuple[int, int]] = {}
    deallocate = bench.manager.deallocate

    def noting(seq: Any) -> None:
        given_back[seq.request_id] = (len(seq.block_table), seq.num_cached_tokens)
        deallocate(seq)

    bench.manager.deallocate = noting  # type: ignore[method-assign]
    run = replay(recorded(bench, [(i * MS, request(i, 5 + 3 * i, 1 + 2 * i)) for i in range(5)], tmp_path))
    header = run.recording.header
    for name, path in run.paths.items():
        state = last_state(path, header)
        assert (state["blocks"], state["tokens"]) == given_back[name] and state["label"] == "estimated"
        token_bytes = header.block_bytes // header.block_size
        assert state["token_exact_bytes"] == state["tokens"] * token_bytes
        assert state["block_exact_bytes"] - state["approximation_bound_bytes"] == state["token_exact_bytes"]
        assert 0 <= state["approximation_bound_bytes"] < header.block_bytes


def test_a_request_that_never_ran_holds_nothing(tmp_path: Path) -> None:
    bench = make_bench(simulated=True, max_num_seqs=1)
    step = bench.engine.step

    def aborting() -> Any:
        if bench.engine.marks.num_steps == 1:
            bench.engine.abort("r1")
        return step()

    bench.engine.step = aborting  # type: ignore[method-assign]
    run = replay(recorded(bench, [(0, request(0, 8, 9)), (0, request(1, 8, 9))], tmp_path))
    assert last_state(run.paths["r1"], run.recording.header)["blocks"] == 0


def test_a_shared_prefix_shows_as_sharing(tmp_path: Path) -> None:
    """Three hold the same three blocks and one of their own each: twelve entries in six blocks."""
    prompts = [[*range(12), i] for i in range(3)]
    one = [{"prompt": prompt, "sampling_params": greedy(3), "request_id": f"r{i}"} for i, prompt in enumerate(prompts)]
    bench = make_bench(simulated=True)
    shared = state_summary(replay(recorded(bench, [(i, each) for i, each in enumerate(one)], tmp_path)))
    bench = make_bench(simulated=True, prefix_mode="off")
    alone = state_summary(replay(recorded(bench, [(i, each) for i, each in enumerate(one)], tmp_path)))
    assert shared["sharing_factor"]["label"] == "estimated" and shared["sharing_factor"]["mean"] > 1.2
    assert abs(alone["sharing_factor"]["mean"] - 1) < 0.05
    assert alone["used_blocks"]["max"] == 12 and alone["bytes_by_kind_max"]["kv_held"] == 12 * 1024
