"""The defects of earlier engines, one test each: what crashed, thrashed, leaked or lied there must not here."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import Segment
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import ConfigError, ContextLengthError, EngineClosedError, InvalidRequestError, OutOfMemoryError
from tests.engine.helpers import Bench, Injected, answer, greedy, make_bench

VOCAB = 251
LONG = [(7 * i + i * i) % VOCAB for i in range(64)]


def bench_of(**knobs: Any) -> Bench:
    return make_bench(**{"vocab_size": VOCAB, **knobs})


def serve(bench: Bench, prompt: list[int], max_tokens: int = 8, **how: Any) -> Any:
    """One request, alone, to its end; its tokens are those of a cold run."""
    request_id = bench.engine.add_request(prompt, greedy(max_tokens), **how)
    final = bench.drain()[request_id]
    if not how.get("prefill_only"):
        assert final.token_ids == answer(prompt, max_tokens, VOCAB)
    return final


def run_seqs(manager: BlockManager, *prompts: list[int]) -> list[Sequence]:
    """Sequences that are allocated and computed, one after the other, and still hold their blocks."""
    seqs = [Sequence(prompt, SamplingParams(), manager.block_size) for prompt in prompts]
    for seq in seqs:
        assert manager.can_allocate(seq)
        manager.allocate(seq)
        manager.hash_blocks(seq, seq.num_tokens)
        seq.num_cached_tokens = seq.num_tokens
    return seqs


# -- what can never be served is refused at the door ---------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "limit", "error", "param"),
    [
        ([], None, InvalidRequestError, "prompt"),
        ([1] * 16, None, ContextLengthError, "prompt"),  # the pool holds 4 blocks of 4
        ([1] * 17, None, ContextLengthError, "prompt"),
        ([1] * 500, None, ContextLengthError, "prompt"),
        ([1] * 8, 8, ContextLengthError, "prompt"),
        ([1, 260], None, InvalidRequestError, "prompt"),
        ([1, -1], None, InvalidRequestError, "prompt"),
    ],
)
def test_hopeless_prompts_are_refused_and_others_go_on(
    prompt: list[int], limit: int | None, error: type[InvalidRequestError], param: str
) -> None:
    bench = bench_of(num_blocks=4, max_model_len=limit)
    other = bench.engine.add_request([5, 6], greedy(3))
    with pytest.raises(error) as caught:
        bench.engine.add_request(prompt, greedy(3), request_id="bad")
    assert caught.value.param == param
    assert bench.terminals("bad") == ["rejected"]
    assert bench.drain()[other].token_ids == answer([5, 6], 3, VOCAB)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias", "temperature", "n", "seed", "top_k", "min_p"])
def test_parameters_of_a_wrong_type_are_named(name: str) -> None:
    for value in (object(), "5" if name != "stop" else 5, [None]):
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", 7])
def test_parameters_that_are_none_are_refused(params: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        bench_of().engine.add_request([1], params)
    assert caught.value.param == "sampling_params"


@pytest.mark.parametrize("content", [5, None, [1, "x"], [300]])
def test_segments_of_neither_text_nor_ids_are_refused(content: Any) -> None:
    bench = bench_of()
    with pytest.raises(InvalidRequestError):
        bench.engine.add_request([Segment("part", content)], request_id="bad")
    assert bench.terminals("bad") == ["rejected"]


@pytest.mark.parametrize(
    "false", [{"token_ids": [1, 260]}, {"num_prompt_tokens": 0}, {"num_prompt_tokens": 9}, {"token_ids": [1] * 11}]
)
def test_a_state_that_contradicts_itself_or_is_complete_is_not_resumed(false: dict[str, Any]) -> None:
    """An id outside the vocabulary would fail the step of everybody else."""
    seq = Sequence([1, 2, 3], greedy(8), 4, "moved")
    bench = bench_of()
    with pytest.raises(InvalidRequestError):
        bench.engine.resume({**seq.__getstate__(), **false})
    assert bench.engine.is_finished() and "moved" not in bench.engine.book
    assert bench.engine.resume(seq.__getstate__()) == "moved"
    assert bench.drain()["moved"].token_ids == answer([1, 2, 3], 8, VOCAB)


def test_the_longest_prompt_that_fits_is_served_alone() -> None:
    bench = bench_of(num_blocks=4)
    assert serve(bench, LONG[:15], 1).finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, True])
def test_max_tokens_zero_is_an_error_and_not_forever(max_tokens: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(max_tokens=max_tokens)
    assert caught.value.param == "max_tokens"


def test_generation_ends_at_max_model_len() -> None:
    bench = bench_of(num_blocks=64, max_model_len=20)
    request_id = bench.engine.add_request(LONG[:10], greedy(500))
    final = bench.drain()[request_id]
    assert len(final.token_ids) == 10 and final.finish_reason == "length"


def test_the_default_parameters_are_not_shared_state() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 0.0  # type: ignore[misc]


# -- the pool runs out ---------------------------------------------------------------------------


def test_pool_exhaustion_preempts_and_everybody_finishes() -> None:
    bench = bench_of(num_blocks=6)
    prompts = [LONG[i : i + 7] for i in range(3)]
    ids = [bench.engine.add_request(prompt, greedy(16)) for prompt in prompts]
    finals = bench.drain()
    assert [finals[i].token_ids for i in ids] == [answer(prompt, 16, VOCAB) for prompt in prompts]


def test_the_last_running_sequence_fails_alone_where_pins_took_its_room() -> None:
    bench = bench_of(num_blocks=4)
    pin = bench.manager.acquire([0, 1], "pin")
    doomed = bench.engine.add_request(LONG[:7], greedy(8))
    later = bench.engine.add_request(LONG[20:24], greedy(3))
    finals = bench.drain_but(pin)
    assert isinstance(finals[doomed].error, OutOfMemoryError) and finals[doomed].finish_reason == "error"
    assert finals[later].token_ids == answer(LONG[20:24], 3, VOCAB)
    bench.manager.release(pin)
    assert serve(bench, LONG[:7]).error is None


def test_preemption_does_not_thrash(capsys: pytest.CaptureFixture[str]) -> None:
    """16 requests of 16 + 64 tokens; upstream: 33 and 30 preemptions, 3.8 prompts of prefill per prompt."""
    prompts = [[(i * 37 + j * 11 + 5 * i * j) % VOCAB for j in range(16)] for i in range(16)]
    for num_blocks in (40, 60):
        bench = bench_of(num_blocks=num_blocks)
        ids = [bench.engine.add_request(prompt, greedy(64)) for prompt in prompts]
        finals = bench.drain()
        assert [finals[i].token_ids for i in ids] == [answer(prompt, 64, VOCAB) for prompt in prompts]
        prefill = (bench.runner.num_computed - 16 * 63) / 256
        with capsys.disabled():
            print(f"\n{num_blocks} blocks: {bench.scheduler.num_preemptions} preemptions, {prefill:.2f}x prefill")
        assert bench.scheduler.num_preemptions <= 8 and prefill <= 2.0


# -- whole hits, preemption, hits after it ---------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_whole_prompt_hit_still_computes_a_token(block_size: int, extra: int) -> None:
    bench = bench_of(block_size=block_size)
    prompt = LONG[: 12 + extra]
    serve(bench, prompt)
    computed = bench.runner.num_computed
    second = serve(bench, prompt)
    hits = (len(prompt) - 1) // block_size * block_size
    assert second.cached_tokens == hits < len(prompt)
    assert bench.runner.num_computed - computed == len(prompt) - hits + 7


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("length", [7, 8, 9])
def test_preempted_anywhere_the_sequence_hits_itself_and_loses_no_token(after: int, length: int) -> None:
    bench = bench_of(max_prefill_chunk=3, num_blocks=16)
    request_id = bench.engine.add_request(LONG[:length], greedy(10))
    for _ in range(after):
        bench.step()
    (seq,) = bench.scheduler.running
    tokens, full = list(seq.token_ids), seq.num_cached_tokens // 4
    bench.scheduler.preempt(seq)
    assert seq.token_ids == tokens and seq.num_cached_tokens == 0 and not seq.block_table
    bench.step()
    assert seq.num_cached_tokens >= min(full, (len(tokens) - 1) // 4) * 4
    assert bench.drain()[request_id].token_ids == answer(LONG[:length], 10, VOCAB)


def test_preempted_sequences_report_the_hits_of_their_first_admission_only() -> None:
    bench = bench_of()
    request_id = bench.engine.add_request(LONG[:12], greedy(6))
    bench.step()
    bench.scheduler.preempt(bench.scheduler.running[0])
    final = bench.drain()[request_id]
    assert (final.cached_tokens, final.potential_cached_tokens) == (0, 0)


# -- shared prefixes -------------------------------------------------------------------------------


def test_identical_prompts_in_one_step_are_computed_once() -> None:
    bench = bench_of()
    ids = [bench.engine.add_request(LONG[:18], greedy(5)) for _ in range(4)]
    finals = bench.drain()
    assert {tuple(finals[i].token_ids) for i in ids} == {tuple(answer(LONG[:18], 5, VOCAB))}
    assert [finals[i].cached_tokens for i in ids] == [0, 16, 16, 16]
    assert bench.runner.num_computed == 18 + 3 * 2 + 4 * 4


def test_followers_take_over_from_an_aborted_producer() -> None:
    bench = bench_of(max_prefill_chunk=4)
    first, *others = [bench.engine.add_request(LONG[:20], greedy(5)) for _ in range(3)]
    bench.step()
    bench.step()
    assert [s.request_id for s in bench.scheduler.running] == [first] and len(bench.scheduler.waiting) == 2
    bench.engine.abort(first)
    finals = bench.drain()
    assert finals[others[0]].cached_tokens == 8 and finals[others[1]].cached_tokens == 16
    assert bench.runner.num_computed == 8 + 12 + 4 + 2 * 4


def test_nobody_waits_for_a_block_its_producer_will_never_compute() -> None:
    """The tails differ inside the last shared block, so there is nothing to wait for."""
    bench = bench_of()
    for tail in (1, 2):
        bench.engine.add_request([*LONG[:3], tail], greedy(4))
    bench.step()
    assert len(bench.scheduler.running) == 2
    bench.drain()


def test_blocks_are_found_only_once_computed() -> None:
    bench = bench_of(max_prefill_chunk=3)
    bench.engine.add_request(LONG[:20], greedy(4))
    probe = Sequence(LONG[:20], SamplingParams(), 4)
    for step in range(1, 7):
        bench.step()
        probe.root_digest = bench.scheduler.running[0].root_digest
        assert len(bench.manager.match(probe)) == min(3 * step // 4, 4)
    bench.drain()


def test_a_second_turn_hits_prompt_and_answer() -> None:
    bench = bench_of()
    first = serve(bench, LONG[:10], 8)
    turn = [*LONG[:10], *first.token_ids, 9, 9, 9]
    assert serve(bench, turn).cached_tokens == (18 - 1) // 4 * 4


def test_prefixes_are_contiguous() -> None:
    bench = bench_of()
    serve(bench, LONG[:16])
    assert serve(bench, [*LONG[:4], 99, *LONG[5:16]]).cached_tokens == 4
    assert serve(bench, LONG[4:16]).cached_tokens == 0


def test_namespaces_and_salts_share_nothing() -> None:
    bench = bench_of()
    serve(bench, LONG[:16], namespace="a")
    assert serve(bench, LONG[:16], namespace="b").cached_tokens == 0
    assert serve(bench, LONG[:16], namespace="a", cache_salt="s").cached_tokens == 0
    assert serve(bench, LONG[:16], namespace="a").cached_tokens == 12


# -- digests ---------------------------------------------------------------------------------------


def constant_digest(parent: bytes, token_ids: Any) -> bytes:
    return b"same"


def test_colliding_digests_cost_a_miss_and_never_foreign_kv() -> None:
    bench = bench_of(digest_fn=constant_digest)
    for prompt in (LONG[:12], LONG[20:32], [*LONG[20:24], *LONG[4:12]], LONG[:12], [*LONG[40:44], *LONG[4:8], 1]):
        serve(bench, prompt)


def test_a_second_preimage_does_not_poison_the_children() -> None:
    """victim b0 b1; attacker a0 b1 with d(a0) = d(b0): equal last blocks behind colliding parents."""
    victim, attacker = [1, 2, 3, 4, 5, 6, 7, 8, 0], [9, 9, 9, 9, 5, 6, 7, 8, 0]

    def colliding(parent: bytes, token_ids: Any) -> bytes:
        return bytes([list(token_ids) == [5, 6, 7, 8], bool(parent == b"\0\0")])

    bench = bench_of(digest_fn=colliding, num_blocks=8)
    for prompt in (attacker, victim, victim[:5], [*victim, 3], attacker, victim):
        serve(bench, prompt)


def test_a_blocked_head_is_hashed_once() -> None:
    bench = bench_of(num_blocks=16, prefix_mode="reuse")
    bench.engine.add_request(LONG[:8], greedy(50))
    bench.step()
    bench.engine.add_request(LONG[10:60], greedy(2))
    bench.step()
    before = bench.manager.index.num_digests
    for _ in range(20):
        bench.step()
    assert len(bench.scheduler.waiting) == 1, "still blocked"
    grown = (8 + 22) // 4 - (8 + 2) // 4
    assert bench.manager.index.num_digests - before <= grown + 1
    bench.drain()
    assert bench.manager.index.num_digests == (8 + 50 - 1) // 4 + (50 + 2 - 1) // 4


def test_the_map_never_outgrows_the_pool() -> None:
    bench = bench_of(num_blocks=8)
    for i in range(12):
        serve(bench, [i, *LONG[:14]])
        assert len(bench.manager.hash_to_block_id) <= 8


# -- who is evicted ----------------------------------------------------------------------------------


def test_a_revived_block_keeps_its_digest_and_chain() -> None:
    manager = BlockManager(4, 4)
    (first,) = run_seqs(manager, LONG[:9])
    digests = [manager.blocks[i].hash_value for i in first.block_table[:2]]
    manager.deallocate(first)
    again = Sequence(LONG[:9], SamplingParams(), 4)
    manager.allocate(again)
    assert [manager.blocks[i].hash_value for i in again.block_table[:2]] == digests
    assert again.num_cached_tokens == 8


def test_free_but_cached_blocks_cost_a_free_block_to_revive() -> None:
    manager = BlockManager(3, 4)
    (first,) = run_seqs(manager, LONG[:12])
    manager.deallocate(first)
    again = Sequence(LONG[:12], SamplingParams(), 4)
    assert len(manager.match(again)) == 2 and manager.num_computed_blocks(again) == 0
    assert manager.can_allocate(again) and not manager.can_allocate(again, headroom=1)
    run_seqs(manager, LONG[:9])
    assert manager.num_computed_blocks(again) == 2
    assert not manager.can_allocate(again), "one more block is needed, none is free"


def test_cached_blocks_outlive_useless_ones() -> None:
    """8 blocks, five requests of 1.25: the first one's prefix is still there."""
    bench = bench_of(num_blocks=8)
    prompts = [[i, *LONG[1:5]] for i in range(5)]
    for prompt in prompts:
        serve(bench, prompt, 1)
    assert serve(bench, prompts[0], 1).cached_tokens == 4


def test_suffixes_are_evicted_before_prefixes() -> None:
    manager = BlockManager(6, 4)
    (old,) = run_seqs(manager, LONG[:16])
    table = list(old.block_table)
    manager.deallocate(old)
    run_seqs(manager, [9] * 12)  # two empty blocks and one cached one
    probe = Sequence([*LONG[:16], 1], SamplingParams(), 4)
    assert [block.block_id for block in manager.match(probe)] == table[:3]


def test_least_recently_used_goes_first_and_a_hit_is_a_use() -> None:
    manager = BlockManager(4, 4)
    for prompt in (LONG[:4], LONG[4:8], LONG[8:12], LONG[12:16], [*LONG[:4], 1]):
        (seq,) = run_seqs(manager, prompt)  # the last one revives the first and evicts the second
        manager.deallocate(seq)
    found = [bool(manager.match(Sequence([*LONG[i : i + 4], 0], SamplingParams(), 4))) for i in (0, 4, 8, 12)]
    assert found == [True, False, True, True]


def test_twins_keep_one_mapping_and_neither_hides_the_other() -> None:
    """Two who compute the same blocks at once: nobody waits for a request that only prefills."""
    bench = bench_of(max_prefill_chunk=4)
    bench.engine.add_request(LONG[:18], greedy(1), prefill_only=True)
    bench.engine.add_request(LONG[:18], greedy(30))
    for _ in range(6):
        bench.step()
    tables = [seq.block_table[:4] for seq in bench.scheduler.running]
    assert len({tuple(t) for t in tables}) == 1
    assert sorted(bench.manager.hash_to_block_id.values())[:4] == sorted(tables[0])[:4]
    late = bench.engine.add_request(LONG[:18], greedy(3))
    assert bench.drain()[late].cached_tokens == 16


# -- prefix modes ------------------------------------------------------------------------------------


def test_observing_reports_potential_and_changes_nothing() -> None:
    computed = {}
    for mode in ("off", "observe", "reuse"):
        bench = bench_of(prefix_mode=mode)
        ids = [bench.engine.add_request(LONG[:18], greedy(4)) for _ in range(2)]
        first = bench.drain()
        last = serve(bench, [*LONG[:18], 1, 2])
        computed[mode] = bench.runner.num_computed
        assert {first[i].cached_tokens for i in ids} == ({0} if mode != "reuse" else {0, 16})
        assert last.cached_tokens == (16 if mode == "reuse" else 0)
        assert last.potential_cached_tokens == (0 if mode == "off" else 16)
    assert computed["observe"] == computed["off"] > computed["reuse"]


# -- the engine as an object ---------------------------------------------------------------------------


def test_two_engines_with_different_block_sizes_live_side_by_side() -> None:
    benches = [bench_of(block_size=size) for size in (1, 4, 16)]
    ids = [bench.engine.add_request(LONG[:21], greedy(9)) for bench in benches]
    finals: dict[int, Any] = {}
    while len(finals) < 3:
        for i, bench in enumerate(benches):
            finals.update((i, out.final) for out in bench.step() if out.final)
    assert ids == ["req-1"] * 3
    assert all(final.token_ids == answer(LONG[:21], 9, VOCAB) for final in finals.values())


def test_closing_twice_ends_everybody_once() -> None:
    bench = bench_of()
    request_id = bench.engine.add_request(LONG[:9], greedy(9))
    bench.step()
    bench.engine.close()
    bench.engine.close()
    assert bench.terminals(request_id) == ["aborted"] and not bench.manager.used_block_ids
    with pytest.raises(EngineClosedError):
        bench.engine.step()
    with pytest.raises(EngineClosedError):
        bench.engine.add_request([1])


def test_an_interrupt_inside_a_step_leaves_the_engine_whole() -> None:
    bench = bench_of(max_prefill_chunk=6)
    ids = [
        bench.engine.add_request(LONG[:9], greedy(5)),
        bench.engine.add_request(LONG[20:40], greedy(1), prefill_only=True),
    ]
    bench.step()
    bench.runner.fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.engine.step()
    assert all(seq.num_scheduled_tokens == 0 for seq in bench.scheduler.live())
    finals = bench.drain()
    assert finals[ids[0]].token_ids == answer(LONG[:9], 5, VOCAB) and finals[ids[1]].finish_reason == "prefilled"


def test_a_failing_step_fails_its_batch_only() -> None:
    bench = bench_of(max_num_seqs=1)
    doomed = bench.engine.add_request(LONG[:9], greedy(5))
    spared = bench.engine.add_request(LONG[20:29], greedy(5))
    bench.step()
    bench.runner.fail_next = Injected("broken kernel")
    finals = bench.drain()
    assert finals[doomed].finish_reason == "error" and "broken kernel" in str(finals[doomed].error.__cause__)
    assert finals[spared].token_ids == answer(LONG[20:29], 5, VOCAB)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("block_siz", "block_size"),
        ("max_num_seq", "max_num_seqs"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
    ],
)
def test_an_unknown_setting_is_an_error_that_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near) as caught:
        EngineConfig.from_kwargs("tiny:random", **{key: 1})
    assert caught.value.param == key


@pytest.mark.parametrize("status", list(SequenceStatus))
def test_the_end_is_the_end(status: SequenceStatus) -> None:
    seq = Sequence([1], SamplingParams(), 4)
    seq.move_to(SequenceStatus.ABORTED)
    with pytest.raises(RuntimeError):
        seq.move_to(status)
