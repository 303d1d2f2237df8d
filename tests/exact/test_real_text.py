"""Seeded sampling on a real model: the same text wherever and however often the request is interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from exact_harness import limit, preempt_at, preempt_each_token, run, sharing_model
from golden_prompts import PROMPTS

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.model

NAMES = ["poem", "story", "question", "chinese", "python", "recipe", "sql", "mixed"]
NUM_TOKENS = 12
VARIED = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2),
    SamplingParams(temperature=1.2, top_k=50, seed=3),
    SamplingParams(temperature=0.7, min_p=0.05, seed=4),
    SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=5),
    SamplingParams(temperature=0.9, presence_penalty=0.5, frequency_penalty=0.5, seed=6),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, min_tokens=9, seed=7),
    SamplingParams(temperature=1.5, top_p=0.5, logit_bias={28: -5.0}, seed=2**64 - 1),
]
PARAMS = [replace(params, max_tokens=NUM_TOKENS) for params in VARIED]


@pytest.fixture(scope="module")
def prompts(smollm2: LLM) -> list[list[int]]:
    return [smollm2.tokenizer.encode(PROMPTS[name][0]) for name in NAMES]


@pytest.fixture(scope="module")
def alone(smollm2: LLM, prompts: list[list[int]]) -> list[Any]:
    """Each request by itself: what all others are held against."""
    return [run(smollm2, [p], [s])[0] for p, s in zip(prompts, PARAMS, strict=True)]


def assert_same(outputs: list[Any], alone: list[Any]) -> None:
    for name, output, expected in zip(NAMES, outputs, alone, strict=True):
        assert output.text == expected.text, name
        assert output.token_ids == expected.token_ids, name
        assert output.finish_reason == expected.finish_reason, name


def test_texts_are_texts(alone: list[Any], capsys: Any) -> None:
    """Different requests say different things, and not one token again and again."""
    assert len({output.text for output in alone}) == len(NAMES)
    assert all(len(set(output.token_ids)) > 4 for output in alone)
    with capsys.disabled():
        print(f"\npoem, seed 1, temperature 1: {alone[0].text!r}")


def test_another_seed_says_something_else(smollm2: LLM, prompts: list[list[int]], alone: list[Any]) -> None:
    others = run(smollm2, prompts[:2], [replace(params, seed=99) for params in PARAMS[:2]])
    assert all(other.text != output.text for other, output in zip(others, alone[:2], strict=True))


def test_same_text_in_a_batch_of_eight(smollm2: LLM, prompts: list[list[int]], alone: list[Any]) -> None:
    assert_same(run(smollm2, prompts, PARAMS), alone)


def test_same_text_in_a_reversed_batch_in_chunks(smollm2: LLM, prompts: list[list[int]], alone: list[Any]) -> None:
    limit(smollm2, max_prefill_chunk=7, max_num_batched_tokens=16)
    outputs = run(smollm2, prompts[::-1], PARAMS[::-1])
    limit(smollm2, max_prefill_chunk=None, max_num_batched_tokens=2048)
    assert_same(outputs[::-1], alone)


@pytest.mark.parametrize("step", [0, 5, 10])
def test_same_text_after_preemption(smollm2: LLM, prompts: list[list[int]], alone: list[Any], step: int) -> None:
    outputs = run(smollm2, prompts, PARAMS, between=preempt_at(step))
    assert_same(outputs, alone)
    assert all(len(output.timeline.preempted_ns) <= 1 for output in outputs)
    assert any(output.timeline.preempted_ns for output in outputs)


def test_same_text_preempted_at_every_token(smollm2: LLM, prompts: list[list[int]], alone: list[Any]) -> None:
    """KV is found again by digest here, as far as full blocks reach, and computed for the rest."""
    with sharing_model(smollm2, prefix_mode="reuse", block_size=4) as llm:
        outputs = run(llm, prompts, PARAMS, between=preempt_each_token())
    assert_same(outputs, alone)
    assert all(len(output.timeline.preempted_ns) >= len(output.token_ids) - 1 for output in outputs)


@pytest.mark.parametrize("num_steps", [0, 1, 9])
def test_same_text_after_hand_over(smollm2: LLM, prompts: list[list[int]], alone: list[Any], num_steps: int) -> None:
    """Another engine goes on from the resume views, which went over a wire; its own requests run beside."""
    engine = smollm2.engine
    ids = [engine.add_request(p, s, request_id=name) for name, p, s in zip(NAMES, prompts, PARAMS, strict=True)]
    outputs: dict[str, Any] = {}
    for _ in range(num_steps):
        outputs |= {out.request_id: out.final for out in engine.step() if out.final}
    wire = [msgspec.msgpack.encode(seq.__getstate__()) for seq in engine.scheduler.live()]
    for request_id in ids:
        engine.abort(request_id)
    engine.flush()
    with sharing_model(smollm2, prefix_mode="reuse") as other:
        other.engine.add_request(prompts[0], PARAMS[1], request_id="neighbour")
        for state in wire:
            other.engine.resume(msgspec.msgpack.decode(state))
        while not other.engine.is_finished():
            outputs |= {out.request_id: out.final for out in other.engine.step() if out.final}
    assert set(outputs) == {*NAMES, "neighbour"}
    assert_same([outputs[name] for name in NAMES], alone)
