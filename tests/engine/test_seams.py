"""The seams: state that arrives later, a runner that sits elsewhere, a clock that is not real, blocks as bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams, Segment
from nanovllm.engine.exec_batch import ExecBatch, ExecResult
from nanovllm.engine.kv_state import TransferReport
from nanovllm.engine.sampling_batch import SamplingBatch
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.simulated_runner import SimulatedRunner
from nanovllm.errors import InvalidRequestError
from tests.engine.fakes import FakeStatePlane, Load
from tests.engine.helpers import COSTS, Bench, answer, greedy, make_bench
from tests.engine.runner_process import ROOT, ProcessRunner

VOCAB = 251
PROMPT = [(7 * i + i * i) % VOCAB for i in range(22)]
OTHER = [200, 3, 5]
TINY = {"model": "tiny:random", "dtype": "float32", "block_size": 4, "num_blocks": 64}


# -- state that arrives later ----------------------------------------------------------------------


def bench_with(load: Load | None, request_id: str = "slow", **knobs: Any) -> tuple[Bench, FakeStatePlane]:
    """An engine whose binds of `request_id` load as `load` says."""
    planes: list[FakeStatePlane] = []

    def with_plane(device: Any, runner: Any) -> FakeStatePlane:
        plan = lambda seq: replace(load) if load and seq.request_id == request_id else None  # noqa: E731
        planes.append(FakeStatePlane(device, plan, runner.write))
        return planes[0]

    return make_bench(kv=with_plane, vocab_size=VOCAB, **knobs), planes[0]


def status_of(bench: Bench, request_id: str) -> SequenceStatus:
    return bench.engine.book.sequences(request_id)[0].status


@pytest.mark.parametrize("delay", [1, 2, 5])
@pytest.mark.parametrize("mode", ["mixed", "separate"])
def test_a_load_blocks_nobody_and_saves_what_it_brings(delay: int, mode: str) -> None:
    bench, _ = bench_with(Load(delay), mode=mode, max_num_seqs=1)
    bench.engine.add_request(PROMPT, greedy(4), request_id="slow")
    bench.engine.add_request(OTHER, greedy(delay), request_id="other")
    for step in range(delay):
        outputs = bench.step()
        assert [out.request_id for out in outputs] == ["other"], f"step {step}"
        assert status_of(bench, "slow") is SequenceStatus.WAITING_FOR_STATE
    finals = bench.drain()
    assert finals["slow"].token_ids == answer(PROMPT, 4, VOCAB) and finals["slow"].cached_tokens == 20
    assert bench.runner.num_computed == 2 + 3 + len(OTHER) + delay - 1
    stages = [event.stage for event in bench.events() if event.request_id == "slow"]
    assert stages.index("loading") < stages.index("scheduled")


@pytest.mark.parametrize("num_tokens", [4, 8, 12, 10**6])
def test_what_was_loaded_can_be_found_by_the_next(num_tokens: int) -> None:
    """Its blocks are published behind their right parents: no hole in the chain."""
    bench, plane = bench_with(Load(2, num_tokens=num_tokens))
    bench.engine.add_request(PROMPT, greedy(3), request_id="slow")
    first = bench.drain()["slow"]
    assert first.cached_tokens == min(num_tokens, 20)
    second = bench.engine.add_request([*PROMPT, 1], greedy(3))
    assert bench.drain()[second].cached_tokens == 20 and plane.num_loads == 1


def test_a_load_that_fails_is_computed_instead_and_not_tried_again() -> None:
    bench, plane = bench_with(Load(2, ok=False))
    bench.engine.add_request(PROMPT, greedy(4), request_id="slow")
    final = bench.drain()["slow"]
    assert final.token_ids == answer(PROMPT, 4, VOCAB)
    assert (final.error, final.cached_tokens, plane.num_loads) == (None, 0, 1)


def test_aborted_while_loading_its_blocks_stay_taken_until_the_transfer_reports() -> None:
    bench, plane = bench_with(Load(3), num_blocks=8)
    bench.engine.add_request(PROMPT, greedy(4), request_id="slow")
    bench.step()
    (transfer,) = plane.in_flight
    destination = set(transfer.lease.block_ids)
    assert bench.engine.abort("slow") and bench.terminals("slow") == []
    assert destination <= bench.manager.used_block_ids and not destination & set(bench.manager.free_block_ids)
    bench.engine.add_request(OTHER, greedy(9), request_id="other")
    while plane.in_flight:
        assert not destination & {b for seq in bench.scheduler.live() for b in seq.block_table}
        bench.step()
    assert destination <= set(bench.manager.free_block_ids)
    assert bench.drain()["other"].token_ids == answer(OTHER, 9, VOCAB)
    assert bench.terminals("slow") == ["aborted"]


def test_a_head_without_room_waits_for_a_late_transfer_instead_of_failing() -> None:
    """Nobody runs and nobody loads, but blocks are about to come back."""
    bench, plane = bench_with(Load(4), num_blocks=6)
    bench.engine.add_request(PROMPT, greedy(1), request_id="slow")
    bench.step()
    bench.engine.abort("slow")
    bench.engine.add_request(PROMPT[::-1], greedy(2), request_id="next")
    bench.step()
    assert status_of(bench, "next") is SequenceStatus.WAITING and plane.in_flight
    assert bench.drain()["next"].token_ids == answer(PROMPT[::-1], 2, VOCAB)


def test_reports_nobody_waits_for_are_ignored() -> None:
    bench, plane = bench_with(Load(3))
    bench.engine.add_request(PROMPT, greedy(4), request_id="slow")
    bench.step()
    (seq,) = bench.scheduler.loading
    generation = plane.in_flight[0].generation
    for report in (TransferReport(seq, generation + 1, True, 20), TransferReport(Sequence([1], greedy(1), 4), 1, True)):
        bench.scheduler.apply_transfers([report])
        assert seq in bench.scheduler.loading and seq.num_cached_tokens == 0
    assert bench.drain()["slow"].token_ids == answer(PROMPT, 4, VOCAB)


def test_who_shares_the_prefix_waits_for_the_load_and_takes_over_when_it_is_aborted() -> None:
    for abort in (False, True):
        bench, plane = bench_with(Load(3))
        bench.engine.add_request(PROMPT, greedy(3), request_id="slow")
        bench.engine.add_request([*PROMPT, 1], greedy(3), request_id="follower")
        bench.step()
        assert len(bench.scheduler.waiting) == 1
        if abort:
            bench.engine.abort("slow")
            bench.step()
            assert [seq.request_id for seq in bench.scheduler.running] == ["follower"]
        finals = bench.drain_but(None)
        assert finals["follower"].token_ids == answer([*PROMPT, 1], 3, VOCAB)
        assert finals["follower"].cached_tokens == (0 if abort else 20)
        while plane.in_flight:
            bench.step()


def test_matching_has_no_side_effects() -> None:
    bench, plane = bench_with(None)
    bench.engine.add_request(PROMPT, greedy(3))
    bench.drain()
    probe = Sequence(PROMPT, greedy(1), 4)
    probe.root_digest = b"elsewhere"
    before = (list(bench.manager.free_block_ids), dict(bench.manager.hash_to_block_id))
    for _ in range(3):
        plane.match(probe)
        plane.has_room(probe, 2)
    assert (list(bench.manager.free_block_ids), dict(bench.manager.hash_to_block_id)) == before


# -- the batch as plain arrays -----------------------------------------------------------------------

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.integers(-1, 50),
    top_p=st.sampled_from([0.5, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, 259), st.floats(-5, 5, width=32), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 259), max_size=2),
    min_tokens=st.integers(0, 3),
    seed=st.one_of(st.none(), st.integers(0, 2**63)),
    logprobs=st.one_of(st.none(), st.integers(0, 5)),
)


@st.composite
def scheduled(draw: Any) -> Sequence:
    token_ids = draw(st.lists(st.integers(0, 259), min_size=1, max_size=20))
    seq = Sequence(token_ids, draw(PARAMS), draw(st.integers(1, 5)), seed=draw(st.integers(0, 2**64 - 1)))
    seq.num_prompt_tokens = draw(st.integers(1, len(token_ids)))
    seq.num_cached_tokens = draw(st.integers(0, len(token_ids) - 1))
    seq.num_scheduled_tokens = draw(st.integers(1, len(token_ids) - seq.num_cached_tokens))
    seq.block_table = draw(st.lists(st.integers(0, 99), min_size=seq.num_blocks, max_size=seq.num_blocks))
    seq.prefill_only, seq.eos_token_ids = draw(st.booleans()), (257,)
    return seq


@settings(max_examples=60, deadline=None)
@given(st.lists(scheduled(), min_size=1, max_size=5))
def test_a_batch_crosses_the_wire_unchanged(seqs: list[Sequence]) -> None:
    batch = ExecBatch.build(seqs)
    again = ExecBatch.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(batch.to_wire())))
    pairs = [(getattr(batch, f.name), getattr(again, f.name)) for f in fields(ExecBatch) if f.name != "sampling"]
    pairs += [(getattr(batch.sampling, f.name), getattr(again.sampling, f.name)) for f in fields(SamplingBatch)]
    for sent, got in pairs:
        assert sent.dtype == got.dtype and sent.shape == got.shape and got.flags.writeable
        np.testing.assert_array_equal(sent, got)


def wire() -> dict[str, Any]:
    seq = Sequence([1, 2, 3], SamplingParams(), 4, block_table=[0])
    seq.num_scheduled_tokens = 3
    return ExecBatch.build([seq]).to_wire()


@pytest.mark.parametrize("field", [f.name for f in fields(ExecBatch)])
def test_a_batch_with_a_field_missing_is_refused(field: str) -> None:
    broken = wire()
    del broken[field]
    with pytest.raises(InvalidRequestError, match=field):
        ExecBatch.from_wire(broken)


@pytest.mark.parametrize(
    "array",
    [
        {"dtype": "|O", "shape": [1], "data": b"12345678"},
        {"dtype": "no dtype", "shape": [1], "data": b"12345678"},
        {"dtype": "<i8", "shape": [2], "data": b"12345678"},
        {"dtype": "<i8", "shape": [1], "data": b"1234567"},
        {"dtype": "<i8", "shape": [1], "data": "text"},
        {"dtype": "<i8", "shape": [1]},
        None,
        7,
    ],
)
def test_arrays_that_are_none_are_refused(array: Any) -> None:
    with pytest.raises(InvalidRequestError):
        ExecBatch.from_wire({**wire(), "positions": array})
    with pytest.raises(InvalidRequestError):
        ExecResult.from_wire({"token_ids": array, "logprobs": []})


def test_results_cross_the_wire() -> None:
    result = ExecResult(np.array([3, 4]), [None, [(4, -0.5), (1, -0.75)]])
    again = ExecResult.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(result.to_wire())))
    assert again.token_ids.tolist() == [3, 4] and again.logprobs == result.logprobs


# -- runners -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    torch.set_num_threads(1)
    with LLM(**TINY, progress=False) as llm:
        yield llm


def tokens(llm: LLM, prompts: Any, params: Any) -> list[list[int]]:
    return [out.token_ids for out in llm.generate(prompts, params)]


def test_a_runner_in_another_process_gives_the_same_tokens(tiny: LLM) -> None:
    prompts = ["Ein Prozess", "und noch einer, der länger ist", [5] * 11]
    params = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=1.0, seed=5, max_tokens=9, ignore_eos=True, repetition_penalty=1.2),
        SamplingParams(temperature=0.9, seed=6, max_tokens=4, top_p=0.8, ignore_eos=True),
    ]
    wanted = tiny.generate(prompts, params)
    with LLM(**TINY, progress=False, max_num_batched_tokens=16) as llm:
        runner = ProcessRunner(**TINY)
        llm.engine.runner = runner  # type: ignore[assignment]
        try:
            got = llm.generate(prompts, params)
        finally:
            status = runner.close()
    assert [out.token_ids for out in got] == [out.token_ids for out in wanted] and status == 0
    assert [row[0][0] for row in got[0].completions[0].logprobs or []] == got[0].token_ids


def test_a_simulated_run_replays_to_the_nanosecond() -> None:
    def run() -> tuple[Any, Any, int]:
        bench = make_bench(simulated=True, vocab_size=256, num_blocks=16, max_num_batched_tokens=16)
        for i in range(5):
            bench.engine.add_request(PROMPT[i:], SamplingParams(max_tokens=9, ignore_eos=True, seed=i))
        finals = bench.drain()
        return bench.events(), [final.token_ids for final in finals.values()], bench.clock.now_ns()

    assert run() == run()


def test_simulated_time_is_what_the_cost_table_says() -> None:
    bench = make_bench(simulated=True)
    assert isinstance(bench.runner, SimulatedRunner)
    request_id = bench.engine.add_request(PROMPT, greedy(2))
    timeline = bench.drain()[request_id].timeline
    assert timeline.label == "simulated"
    assert timeline.t_prefill_ns == int((COSTS.base_ms + COSTS.step_ms([(0, 22)])) * 1e6)
    assert timeline.decode_gaps_ns == [int((COSTS.base_ms + COSTS.step_ms([(22, 1)])) * 1e6)]


def test_a_simulated_engine_needs_no_torch() -> None:
    script = (
        "import sys\nfrom tests.engine.helpers import make_bench, greedy\n"
        "bench = make_bench(simulated=True)\nbench.engine.add_request([1, 2, 3], greedy(3))\nbench.drain()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# -- blocks as bytes -------------------------------------------------------------------------------------


def test_blocks_read_and_written_are_the_same_bytes(tiny: LLM) -> None:
    tier = tiny.engine.parts.device_tier
    assert tier is not None
    tiny.generate("some text that fills a few blocks", SamplingParams(max_tokens=1))
    for source, target in ((0, 63), (1, 62)):
        data = tier.read_block(source)
        assert len(data) == tier.block_bytes == 2 * 2 * 2 * 4 * 16 * 4
        tier.write_block(target, data)
        assert tier.read_block(target) == data and torch.equal(tier.pool[source], tier.pool[target])


@pytest.mark.parametrize("change", [b"", b"\0"])
def test_foreign_sizes_and_ids_are_refused(tiny: LLM, change: bytes) -> None:
    tier = tiny.engine.parts.device_tier
    assert tier is not None
    with pytest.raises(InvalidRequestError, match="bytes"):
        tier.write_block(0, tier.read_block(0)[1:] + change * 2)
    for block_id in (-1, 64):
        with pytest.raises(InvalidRequestError, match="no block"):
            tier.read_block(block_id)


def export(llm: LLM, prompt: list[int]) -> list[bytes]:
    """The bytes of the blocks in which `llm` holds the prefix of `prompt`."""
    engine = llm.engine
    request_id = engine.add_request(prompt, SamplingParams(max_tokens=1), prefill_only=True)
    (probe,) = engine.book.sequences(request_id)
    while not probe.is_finished:
        engine.step()
    manager, tier = engine.scheduler.kv.block_manager, engine.parts.device_tier  # type: ignore[attr-defined]
    return [tier.read_block(block.block_id) for block in manager.match(probe)]  # type: ignore[union-attr]


def test_blocks_carried_to_another_engine_give_the_same_tokens(tiny: LLM) -> None:
    prompt = tiny.tokenizer.encode("State moves as bytes, and the text goes on as if nothing had happened.")
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (wanted,) = tokens(tiny, [prompt], params)
    blocks = export(tiny, prompt)
    assert len(blocks) == (len(prompt) - 1) // 4
    with LLM(**TINY, progress=False) as other:
        tier = other.engine.parts.device_tier

        def write(table: list[int], token_ids: list[int], start: int, end: int) -> None:
            for i in range(start // 4, end // 4):
                tier.write_block(table[i], blocks[i])  # type: ignore[union-attr]

        device: Any = other.engine.scheduler.kv
        other.engine.scheduler.kv = FakeStatePlane(device, lambda seq: Load(2), write)
        (got,) = other.generate([prompt], params)
    assert got.token_ids == wanted and got.cached_tokens == 4 * len(blocks)
    assert sum(run.num_tokens for run in got.timeline.prefill_runs) == len(prompt) - got.cached_tokens


# -- prompts told as parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [["You are terse.", " A document.", " Why?"], ["", "x", ""], [[65, 66], "c", [68]], ["<|im_start|>", "a"]]
)
def test_segments_cover_the_prompt_and_change_no_token(tiny: LLM, parts: list[Any]) -> None:
    segments = [Segment(f"part {i}", part) for i, part in enumerate(parts)]
    (final,) = tiny.generate([segments], SamplingParams(temperature=0.0, max_tokens=4))
    assert [span.name for span in final.segments] == [segment.name for segment in segments]
    assert final.segments[0].start == 0 and final.segments[-1].end == final.prompt_len
    assert all(a.end == b.start for a, b in zip(final.segments, final.segments[1:], strict=False))
    if all(isinstance(part, str) for part in parts):
        (joined,) = tiny.generate("".join(parts), SamplingParams(temperature=0.0, max_tokens=4))
        assert (joined.prompt_token_ids, joined.token_ids) == (final.prompt_token_ids, final.token_ids)
