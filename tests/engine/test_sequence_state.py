"""A sequence that moves: each field of the resume view is needed, and what a false one does is shown."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from nanovllm import LLM, SamplingParams, Segment
from nanovllm.engine import sequence_state
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidRequestError

PROMPT = [Segment("system", "be brief. "), Segment("question", "what is a block?")]
PARAMS = SamplingParams(temperature=0.9, max_tokens=12, seed=3, ignore_eos=True, stop=["\0\0"], logit_bias={9: -1.0})
ROWS = re.findall(r"^\| (\w+) +\|", sequence_state.__doc__ or "", re.MULTILINE)[1:]


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[LLM, LLM]]:
    settings: dict[str, Any] = {"dtype": "float32", "block_size": 4, "num_blocks": 64, "check_invariants": True}
    with LLM("tiny:random", **settings) as first, LLM("tiny:random", **settings) as second:
        yield first, second


def started(llm: LLM, steps: int = 5, **request: Any) -> Sequence:
    """A sequence in the middle of its life."""
    request_id = llm.engine.add_request(**{"prompt": PROMPT, "sampling_params": PARAMS, **request})
    for _ in range(steps):
        llm.engine.step()
    return llm.engine.book.sequences(request_id)[0]


def moved(first: LLM, second: LLM, change: dict[str, Any] | None = None, **request: Any) -> Any:
    """Start in one engine, hand the state over as bytes, abort there, finish in the other."""
    seq = started(first, **request)
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(seq.__getstate__()))
    first.engine.abort(seq.request_id)
    first.engine.flush()
    request_id = second.engine.resume({**state, **(change or {})})
    finals = [out.final for out in second.engine.driver.listen([request_id]) if out.final]
    return finals[0]


def test_the_table_names_the_fields_that_move() -> None:
    assert tuple(ROWS) == sequence_state.RESUME_FIELDS


def test_the_view_is_plain_and_holds_no_physical_state(engines: tuple[LLM, LLM]) -> None:
    seq = started(engines[0])
    assert seq.block_table and seq.num_cached_tokens
    state = seq.__getstate__()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state)) == state
    assert state["num_cached_tokens"] == 0 and "block_table" not in state and "timeline" not in state
    restored = copy.copy(seq)
    assert restored.token_ids == seq.token_ids and restored.block_table == [] and restored.num_cached_tokens == 0
    engines[0].engine.abort(seq.request_id)
    engines[0].engine.flush()


@pytest.mark.parametrize("field", ROWS)
def test_a_lost_field_stops_the_request(engines: tuple[LLM, LLM], field: str) -> None:
    seq = started(engines[0], steps=2)
    state = seq.__getstate__()
    engines[0].engine.abort(seq.request_id)
    engines[0].engine.flush()
    del state[field]
    with pytest.raises(InvalidRequestError, match=field) as caught:
        engines[1].engine.resume(state)
    assert caught.value.param == field and engines[1].engine.is_finished()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_moved_request_gives_the_text_of_an_unmoved_one(engines: tuple[LLM, LLM], temperature: float) -> None:
    params = replace(PARAMS, temperature=temperature)
    expected = engines[0].generate([PROMPT], params)[0]
    final = moved(*engines, sampling_params=params)
    assert final.token_ids == expected.token_ids and final.text == expected.text
    assert final.prompt_token_ids == expected.prompt_token_ids and final.segments == expected.segments


def test_false_tokens_continue_another_text(engines: tuple[LLM, LLM]) -> None:
    expected, other = moved(*engines), list(range(30, 60))
    assert moved(*engines, {"token_ids": other, "num_prompt_tokens": 26}).token_ids[4:] != expected.token_ids[4:]


def test_a_false_prompt_length_moves_the_completion(engines: tuple[LLM, LLM]) -> None:
    expected = moved(*engines)
    false = moved(*engines, {"num_prompt_tokens": expected.prompt_len - 2})
    assert false.prompt_len == expected.prompt_len - 2
    assert false.token_ids[2:] == expected.token_ids[:10], "two prompt tokens are answered, two answers are missing"


def test_false_sampling_params_choose_and_end_otherwise(engines: tuple[LLM, LLM]) -> None:
    expected, plain = moved(*engines), SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
    state = Sequence([1], plain, 4).__getstate__()["sampling_params"]
    false = moved(*engines, {"sampling_params": state})
    assert len(false.token_ids) == 7 and false.token_ids != expected.token_ids[:7]


def test_a_false_seed_samples_another_text(engines: tuple[LLM, LLM]) -> None:
    expected, false = moved(*engines), moved(*engines, {"seed": 4})
    assert false.token_ids[:5] == expected.token_ids[:5] and false.token_ids != expected.token_ids


def test_a_false_block_size_is_refused(engines: tuple[LLM, LLM]) -> None:
    with pytest.raises(InvalidRequestError, match="block_size"):
        moved(*engines, {"block_size": 8})


def test_a_false_request_id_answers_somebody_else(engines: tuple[LLM, LLM]) -> None:
    assert moved(*engines, {"request_id": "yours"}).request_id == "yours"


def test_a_false_index_returns_another_sample(engines: tuple[LLM, LLM]) -> None:
    assert moved(*engines, {"index": 2}).completions[0].index == 2


def test_a_false_namespace_sees_another_tenants_state(engines: tuple[LLM, LLM]) -> None:
    prompt = list(range(120, 150))
    engines[1].engine.generate([{"prompt": prompt, "namespace": "b", "sampling_params": PARAMS}])
    right = moved(*engines, prompt=prompt, namespace="a")
    assert right.cached_tokens == 0
    assert moved(*engines, {"namespace": "b"}, prompt=prompt, namespace="a").cached_tokens > 0


def test_a_false_priority_overtakes(engines: tuple[LLM, LLM]) -> None:
    seqs = [Sequence([1], PARAMS, 4, request_id="a", priority=p) for p in (5, 0)]
    states = [seq.__getstate__() for seq in seqs]
    assert [state["priority"] for state in states] == [5, 0]
    restored = copy.copy(seqs[0])
    restored.__setstate__({**states[0], "priority": -1})
    assert min([restored, seqs[1]], key=lambda s: s.priority) is restored


def test_a_false_prefill_only_never_answers(engines: tuple[LLM, LLM]) -> None:
    final = moved(*engines, {"prefill_only": True})
    assert final.finish_reason == "prefilled" and len(final.token_ids) == 5, "no token beyond those it came with"


def test_false_segments_name_other_tokens(engines: tuple[LLM, LLM]) -> None:
    assert [s.name for s in moved(*engines).segments] == ["system", "question"]
    assert [s.name for s in moved(*engines, {"segments": [["other", 0, 3]]}).segments] == ["other"]


def test_a_false_preemption_count_joins_two_lives_in_one_epoch(engines: tuple[LLM, LLM]) -> None:
    reader = engines[1].engine.events.reader()
    moved(*engines, {"num_preemptions": 3})
    assert {event.epoch for event in reader.poll() if getattr(event, "stage", "") == "decode_step"} == {3}


def test_the_worker_view_names_the_tokens_to_compute_and_their_blocks(engines: tuple[LLM, LLM]) -> None:
    seq = started(engines[0])
    seq.num_scheduled_tokens = 1
    view = sequence_state.worker_view(seq)
    seq.num_scheduled_tokens = 0
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(view)) == view
    assert view["token_ids"] == [seq.token_ids[-1]] and view["start"] == seq.num_tokens - 1
    assert view["block_table"] == seq.block_table and "sampling_params" not in view
    engines[0].engine.abort(seq.request_id)
    engines[0].engine.flush()
