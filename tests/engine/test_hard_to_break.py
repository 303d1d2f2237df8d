"""What a review found: states, labels and callers that once hung the engine or took others down with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError, InvalidRequestError, NanoVLLMError, RequestNotFoundError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
HUGE = 10**5000


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with LLM("tiny:random", dtype="float32", block_size=4, num_blocks=64, check_invariants=True) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert shared.engine.is_finished() and not shared.engine.book.request_ids


def test_a_stream_hears_its_end_whoever_stepped(llm: LLM) -> None:
    stream = llm.stream("hello", GREEDY)
    first = next(stream)
    llm.engine.abort(first.request_id)
    llm.engine.flush()
    assert [out.finish_reason for out in stream] == ["abort"]
    stream = llm.stream("hello", GREEDY)
    tokens = next(stream).token_ids
    while not llm.engine.is_finished():
        llm.engine.step()
    assert tokens + [t for out in stream for t in out.token_ids] == llm.generate("hello", GREEDY)[0].token_ids


def test_listening_for_a_request_that_is_over_is_an_error(llm: LLM) -> None:
    request_id = llm.engine.add_request("hello", GREEDY)
    while not llm.engine.is_finished():
        llm.engine.step()
    with pytest.raises(RequestNotFoundError):
        list(llm.engine.driver.listen([request_id]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1), ("seed", 2**64), ("seed", "x"), ("request_id", None), ("request_id", ""), ("prefill_only", "x"),
        ("num_prompt_tokens", -1), ("num_prompt_tokens", 10**6), ("index", 99), ("priority", "a"),
        ("num_preemptions", -3), ("token_ids", None), ("token_ids", [[1]]), ("token_ids", []), ("token_ids", [999]),
        ("sampling_params", None), ("sampling_params", []), ("sampling_params", {"colour": 1}),
        ("sampling_params", {"logit_bias": 5}), ("sampling_params", {"temperature": "hot"}), ("segments", None),
        ("segments", [[1]]), ("segments", [["a", 0, "b"]]), ("namespace", b"x"), ("block_size", 0),
    ],
)  # fmt: skip
def test_a_malformed_state_is_refused_and_harms_nobody(llm: LLM, field: str, value: Any) -> None:
    bystander = llm.stream("hello", GREEDY)
    tokens = next(bystander).token_ids
    request_id = llm.engine.add_request("state", GREEDY)
    for _ in range(3):
        llm.engine.step()
    state = llm.engine.book.sequences(request_id)[0].__getstate__()
    llm.engine.abort(request_id)
    with pytest.raises(InvalidRequestError) as caught:
        llm.engine.resume({**state, field: value})
    assert caught.value.param
    assert tokens + [t for out in bystander for t in out.token_ids] == llm.generate("hello", GREEDY)[0].token_ids


def test_all_samples_of_a_request_move_together(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=8, seed=1, ignore_eos=True)
    expected = [c.token_ids for c in llm.generate("hello", params)[0].completions]
    request_id = llm.engine.add_request("hello", params)
    for _ in range(4):
        llm.engine.step()
    states = [seq.__getstate__() for seq in llm.engine.book.sequences(request_id)]
    llm.engine.abort(request_id)
    llm.engine.flush()
    finals = [out.final for out in llm.engine.driver.listen([llm.engine.resume(*states)]) if out.final]
    assert [c.token_ids for c in finals[0].completions] == expected


@pytest.mark.parametrize(
    "labels", [{"prefill_only": "no"}, {"namespace": 5}, {"cache_salt": b"x"}, {"request_id": 5}, {"priority": "a"}]
)
def test_labels_are_of_their_kind(llm: LLM, labels: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(labels))):
        llm.engine.add_request("a", **labels)


@pytest.mark.parametrize(
    "params",
    [{"temperature": HUGE}, {"max_tokens": HUGE}, {"logit_bias": {1: HUGE}}, {"stop": [HUGE]}, {"seed": HUGE},
     {"repetition_penalty": 1e-38}, {"top_k": HUGE}, {"stop_token_ids": [HUGE]}],
)  # fmt: skip
def test_huge_numbers_in_params_are_refused_in_a_short_sentence(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**params)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "settings",
    [{"prefill_during_decode": "false"}, {"check_invariants": 1}, {"tensor_parallel_size": True},
     {"tensor_parallel_size": 1.0}, {"block_size": 4, "kvcache_block_size": 8}, {"kv_memory": 1.5},
     {"event_capacity": 2**63}, {"num_threads": 10**6}, {"num_blocks": HUGE}, {"watermark": HUGE}, {"seed": HUGE},
     {"dtype": np.array(["float32"])}, {"policy": None}],
)  # fmt: skip
def test_settings_that_look_right_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_kwargs("tiny:random", **settings)
    assert caught.value.param in {*settings, "kvcache_block_size"} and len(str(caught.value)) < 300


@pytest.mark.parametrize("model", [None, 5, b"tiny:random"])
def test_a_model_is_named_by_text(model: Any) -> None:
    with pytest.raises(ConfigError, match="model"):
        LLM(model)


@pytest.mark.parametrize("params", [5, {}, [{}], [None], "x", (p for p in [GREEDY])])
def test_sampling_params_are_nothing_else(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        llm.generate(["a"], params)
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        next(llm.stream("a", params))


@pytest.mark.parametrize("messages", [None, 5, "hello", {"role": "user"}, [5], [[5]]])
def test_messages_are_a_list_of_messages(llm: LLM, messages: Any) -> None:
    with pytest.raises(NanoVLLMError):
        llm.chat(messages, GREEDY)


def test_unknown_keywords_are_errors(llm: LLM) -> None:
    for call in (llm.generate, llm.chat, llm.stream):
        with pytest.raises(TypeError, match="temprature"):
            call([{"role": "user", "content": "hi"}], temprature=0)
    with pytest.raises(InvalidRequestError, match="chat template"):
        next(llm.stream("plain", chat_template_kwargs={"tools": []}))


def test_numpy_integers_are_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    assert llm.generate([list(np.array(ids))], GREEDY)[0].token_ids == llm.generate([ids], GREEDY)[0].token_ids
    with pytest.raises(InvalidRequestError):
        llm.generate([[HUGE]], GREEDY)


def test_logprobs_ask_for_no_more_tokens_than_there_are(llm: LLM) -> None:
    small = replace(llm.engine.intake, vocab_size=10)
    small.check([1], SamplingParams(logprobs=10))
    with pytest.raises(InvalidRequestError, match="only 10 tokens"):
        small.check([1], SamplingParams(logprobs=11))


def test_priorities_rank_the_prompts_of_one_call() -> None:
    with LLM("tiny:random", policy="priority", max_num_seqs=1, block_size=4, num_blocks=64) as llm:
        reader = llm.engine.events.reader()
        llm.generate(["a", "b", "c"], GREEDY, priority=[2, 0, 1])
        first = [e.request_id for e in reader.poll() if getattr(e, "stage", "") == "first_token"]
        assert first == ["req-2", "req-3", "req-1"]
        with pytest.raises(InvalidRequestError, match="priorities"):
            llm.generate(["a", "b"], GREEDY, priority=[1])
