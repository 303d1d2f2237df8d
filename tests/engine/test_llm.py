"""The offline face: what may be handed in, what comes back, and what is left behind (nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

from nanovllm import LLM, SamplingParams, Segment
from nanovllm.engine.integrity import check_blocks
from nanovllm.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    ExecutionError,
    InvalidRequestError,
    ModelNotFoundError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with LLM("tiny:random", dtype="float32", block_size=4, num_blocks=64, check_invariants=True) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert held(shared) == 0 and shared.engine.is_finished() and not shared.engine.book.request_ids
    check_blocks(blocks(shared), [])


def blocks(llm: LLM) -> Any:
    return llm.engine.scheduler.kv.block_manager  # type: ignore[attr-defined]


def held(llm: LLM) -> int:
    """Blocks that somebody holds."""
    return len(blocks(llm).used_block_ids)


def test_text_ids_segments_and_a_mix_of_them(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    text, tokens, parts = llm.generate(["hello", ids, [Segment("a", "hel"), Segment("b", "lo")]], GREEDY)
    assert text.token_ids == tokens.token_ids == parts.token_ids and len(text.token_ids) == 8
    assert [(s.name, s.start, s.end) for s in parts.segments] == [("a", 0, 4), ("b", 4, 6)]
    assert llm.generate("hello", GREEDY)[0].text == llm.generate(ids, GREEDY)[0].text == text.text
    assert llm.generate([], GREEDY) == []


def test_an_output_answers_by_attribute_and_by_key(llm: LLM) -> None:
    out = llm.generate("hello", GREEDY)[0]
    assert out["text"] == out.text and out["token_ids"] == out.token_ids and out["prompt_len"] == out.prompt_len == 6
    assert out.finish_reason == "length" and out.timeline.ttft_ns and len(out.timeline.decode_gaps_ns) == 7
    with pytest.raises(KeyError):
        out["colour"]


def test_cached_tokens_are_prefix_hits_alone(llm: LLM) -> None:
    prompt = list(range(40, 61))
    first, second = llm.generate([prompt], GREEDY)[0], llm.generate([prompt], GREEDY)[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 20) and first.token_ids == second.token_ids


def test_one_params_for_all_or_one_for_each(llm: LLM) -> None:
    short, long = llm.generate(["a", "b"], [SamplingParams(max_tokens=2, ignore_eos=True), GREEDY])
    assert (len(short.token_ids), len(long.token_ids)) == (2, 8)
    with pytest.raises(InvalidRequestError, match="2 prompts, but 1"):
        llm.generate(["a", "b"], [GREEDY])


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    assert [len(out.token_ids) for out in llm.generate(["x", "y", "z"], params)] == [9, 1, 5]


@pytest.mark.parametrize(
    ("prompt", "error", "param"),
    [
        ("", InvalidRequestError, None),
        ([], InvalidRequestError, "prompt"),
        ([0, 260], InvalidRequestError, "prompt"),
        ([-1], InvalidRequestError, "prompt"),
        ([True], InvalidRequestError, "prompt"),
        ([1.5], InvalidRequestError, "prompt"),
        (b"bytes", InvalidRequestError, "prompts"),
        (None, InvalidRequestError, "prompts"),
        ([[1] * 256], ContextLengthError, "prompt"),
    ],
)
def test_bad_prompts_are_refused_and_the_engine_stays_whole(llm: LLM, prompt: Any, error: type, param: str) -> None:
    if prompt == "":
        assert len(llm.generate("", GREEDY)) == 1  # a BOS is a prompt
        return
    with pytest.raises(error) as caught:
        llm.generate(["fine", prompt] if isinstance(prompt, list) and prompt != [[1] * 256] else prompt, GREEDY)
    assert caught.value.param == param


def test_token_ids_outside_the_vocabulary_are_refused_in_params(llm: LLM) -> None:
    for params in (SamplingParams(stop_token_ids=[999]), SamplingParams(logit_bias={999: 1.0})):
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            llm.generate("a", params)


@pytest.mark.parametrize("priority", ["high", 1.5, None, True])
def test_a_priority_is_an_integer(llm: LLM, priority: Any) -> None:
    with pytest.raises(InvalidRequestError, match="priority"):
        llm.engine.add_request("a", priority=priority)


def test_an_id_of_our_own_never_meets_a_callers(llm: LLM) -> None:
    taken = f"req-{llm.engine._num_requests + 1}"
    llm.engine.add_request("a", GREEDY, request_id=taken)
    assert llm.engine.add_request("b", GREEDY) != taken
    for request_id in llm.engine.book.request_ids:
        llm.engine.abort(request_id)
    llm.engine.flush()


def test_chat_shows_what_its_template_added(llm: LLM) -> None:
    out = llm.chat(CHAT, GREEDY)[0]
    rendered = llm.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert out.template_tokens == out.prompt_len - 2 > 0
    assert llm.generate(rendered, GREEDY)[0].token_ids == out.token_ids
    assert [o.token_ids for o in llm.chat([CHAT, CHAT], GREEDY)] == [out.token_ids] * 2


def test_a_bos_is_never_doubled(llm: LLM) -> None:
    assert llm.generate("<|bos|>hi", GREEDY)[0].prompt_token_ids == llm.generate("hi", GREEDY)[0].prompt_token_ids


def test_a_stream_makes_up_the_answer(llm: LLM) -> None:
    increments = list(llm.stream("hello", GREEDY))
    final = increments[-1].final
    assert final is not None and "".join(o.text for o in increments) == final.text
    assert [t for o in increments for t in o.token_ids] == final.token_ids == llm.generate("hello", GREEDY)[0].token_ids
    assert [o.finish_reason for o in increments] == [None] * (len(increments) - 1) + ["length"]


def test_closing_a_stream_gives_its_blocks_back(llm: LLM) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    assert held(llm) > 0
    stream.close()
    assert held(llm) == 0 and llm.engine.is_finished()


def test_two_streams_interleave(llm: LLM) -> None:
    expected = [out.token_ids for out in llm.generate(["abc", "xyz"], GREEDY)]
    streams = [llm.stream("abc", GREEDY), llm.stream("xyz", GREEDY)]
    got: list[list[int]] = [[], []]
    for _ in range(8):
        for tokens, stream in zip(got, streams, strict=True):
            tokens += next(stream).token_ids
    assert got == expected
    assert [list(stream) for stream in streams] == [[], []]


def test_a_call_beside_a_stream_leaves_it_alone(llm: LLM) -> None:
    expected = llm.generate("abc", GREEDY)[0].token_ids
    stream = llm.stream("abc", GREEDY)
    first = next(stream).token_ids
    llm.generate(["other"] * 3, GREEDY)
    assert first + [t for o in stream for t in o.token_ids] == expected


def test_an_interrupt_frees_everything(llm: LLM) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    llm.after_step.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY)
    llm.after_step.remove(interrupt)


def test_a_step_that_fails_fails_its_requests_and_no_more(llm: LLM) -> None:
    expected = llm.generate("abc", GREEDY)[0].token_ids
    with (
        patch.object(llm.engine.runner, "launch", side_effect=RuntimeError("the device is gone")),
        pytest.raises(ExecutionError, match="The engine failed at forward: RuntimeError"),
    ):
        llm.generate("abc", GREEDY)
    assert llm.generate("abc", GREEDY)[0].token_ids == expected


def test_n_samples_differ_and_share_the_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=6, seed=5, ignore_eos=True)
    out = llm.generate(list(range(30, 43)), params)[0]
    assert [c.index for c in out.completions] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in out.completions}) == 3
    assert out.completions[0].token_ids == out.token_ids
    again = llm.generate(list(range(30, 43)), params)[0]
    assert [c.token_ids for c in again.completions] == [c.token_ids for c in out.completions]


def test_logprobs_come_with_each_token(llm: LLM) -> None:
    out = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, ignore_eos=True))[0]
    rows = out.completions[0].logprobs
    assert rows is not None and [row[0][0] for row in rows] == out.token_ids
    assert all(len(row) == 3 and row[0] == row[1] and row[1][1] >= row[2][1] for row in rows)


def test_prefill_only_computes_state_and_says_nothing(llm: LLM) -> None:
    prompt = list(range(100, 121))
    final = llm.engine.generate([{"prompt": prompt, "prefill_only": True}])[0]
    assert (final.finish_reason, final.token_ids, final.text) == ("prefilled", [], "")
    assert llm.generate([prompt], GREEDY)[0].cached_tokens == 20


def test_settings_nobody_knows_are_refused_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match=r"'blok_size' is unknown\. Did you mean 'block_size'"):
        LLM("tiny:random", blok_size=4)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        LLM("tiny:random", tensor_parallel_size=2)
    with pytest.raises(ModelNotFoundError):
        LLM("no/such/model/here")


def test_upstream_names_are_known() -> None:
    with LLM("tiny:random", enforce_eager=True, tensor_parallel_size=1, gpu_memory_utilization=0.9,
             kvcache_block_size=8, max_model_len=100, use_tqdm=False, kv_memory="1MiB") as llm:  # fmt: skip
        assert blocks(llm).block_size == 8 and llm.engine.intake.max_model_len == 100


def test_two_engines_live_in_one_process(llm: LLM) -> None:
    with LLM("tiny:random", dtype="float32", block_size=7, num_blocks=9) as other:
        streams = [one.stream("hello", GREEDY) for one in (llm, other)]
        got: list[list[int]] = [[], []]
        for _ in range(8):
            for tokens, stream in zip(got, streams, strict=True):
                tokens += next(stream).token_ids
        assert got[0] == got[1] and [list(s) for s in streams] == [[], []]


def test_a_closed_engine_says_so_and_closes_again() -> None:
    with LLM("tiny:random", num_blocks=8) as llm:
        stream = llm.stream("hello", GREEDY)
        next(stream)
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("a", GREEDY)


def test_max_model_len_is_lowered_to_the_pool_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with LLM("tiny:random", block_size=4, num_blocks=5, max_model_len=500) as llm:
        assert "lowered from 500 to 20 tokens" in caplog.text
        out = llm.generate([list(range(10))], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))[0]
        assert (len(out.token_ids), out.finish_reason) == (10, "length")
        with pytest.raises(ContextLengthError):
            llm.generate([list(range(20))], GREEDY)
