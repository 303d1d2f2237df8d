"""Grammars: what they refuse, what they hold a model to, and that nothing a request goes through loses the place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from threading import Event, Semaphore
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, Grammar, SamplingParams
from nanovllm.core.grammar import MAX_BYTES, MAX_DEPTH
from nanovllm.engine.exec_batch import ExecBatch
from nanovllm.engine.grammar import MAX_EACH, MAX_KEPT, MAX_WAITING, GrammarCompiler
from nanovllm.engine.sampler import Sampler
from nanovllm.engine.sampling_batch import SamplingBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import BusyError, ExecutionError, InvalidRequestError, UnsupportedParameterError
from nanovllm.models.byte_tokenizer import ByteTokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = Grammar.json_schema(PERSON)
CHOICES = ["yes", "no", 'qu"ote\n\\', "可以", "naïve 😀"]


def params(grammar: Grammar, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 120, "seed": 7, "grammar": grammar, **more})


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"] and re.fullmatch("[a-z]{1,6}", person["name"])
    assert 0 <= person["age"] <= 150 and len(person["tags"]) <= 2 and set(person["tags"]) <= {"x", "y"}


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with LLM("tiny:random", dtype="float32", block_size=4, num_blocks=200, check_invariants=True) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert shared.engine.is_finished() and not shared.engine.book.request_ids
    assert not shared.engine.scheduler.kv.block_manager.used_block_ids  # type: ignore[attr-defined]


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(ByteTokenizer(), (257, 259), 260)
    yield compiler
    compiler.close()


# -- the data --------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


CIRCLE: dict[str, Any] = {}
CIRCLE["anyOf"] = [CIRCLE, CIRCLE]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar("pickle", "x"),
        lambda: Grammar("regex", ""),
        lambda: Grammar("json_object", "{}"),
        lambda: Grammar("regex", 5),  # type: ignore[arg-type]
        lambda: Grammar.regex("a" * (MAX_BYTES + 1)),
        lambda: Grammar.regex("é" * (MAX_BYTES // 2 + 1)),
        lambda: Grammar.regex("\ud800"),
        lambda: Grammar.json_schema({"enum": ["x" * MAX_BYTES]}),
        lambda: Grammar.json_schema(nested(MAX_DEPTH + 1)),
        lambda: Grammar.json_schema(json.dumps(nested(MAX_DEPTH + 1))),
        lambda: Grammar.json_schema('{"not":' * 9000 + "{}" + "}" * 9000),
        lambda: Grammar.json_schema(CIRCLE),
        lambda: Grammar.json_schema({"enum": [[] for _ in range(MAX_BYTES)]}),
        lambda: Grammar.json_schema({"const": float("nan")}),
        lambda: Grammar.json_schema({"const": object()}),
        lambda: Grammar.json_schema("{"),
        lambda: Grammar.json_schema("[]"),
        lambda: Grammar.json_schema([]),  # type: ignore[arg-type]
        lambda: Grammar.choice([]),
        lambda: Grammar.choice(["a", ""]),
        lambda: Grammar.choice("ab"),
        lambda: Grammar.choice(["a"] * 5000),
        lambda: SamplingParams(grammar="regex"),  # type: ignore[arg-type]
        lambda: SamplingParams(grammar={"kind": "regex", "text": "a", "more": 1}),  # type: ignore[arg-type]
        lambda: SamplingParams(grammar={"text": "a"}),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_grammar_or_too_large_is_refused_when_it_is_made(make: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.param == "grammar" and len(str(caught.value)) < 300


def test_the_limits_themselves_are_allowed() -> None:
    Grammar.json_schema(nested(MAX_DEPTH))
    Grammar.regex("a" * MAX_BYTES)


def test_a_minimum_of_tokens_and_a_grammar_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params(SCHEMA, min_tokens=3)
    assert caught.value.param == "min_tokens"


# -- compiling -------------------------------------------------------------------------------------

HOSTILE = {
    "60,000 groups": Grammar.regex("(" * 30000 + "a" + ")" * 30000),
    "groups in a schema": Grammar.json_schema({"type": "string", "pattern": "(" * 30000 + "a" + ")" * 30000}),
    "groups in lark": Grammar.lark("start: " + "(" * 30000 + '"a"' + ")" * 30000),
    "repeated repetition": Grammar.regex("((a{1,1000}){1,1000}){1,1000}"),
    "exponential automaton": Grammar.regex("(.*a.{60}|.*b.{62})"),
    "huge counts": Grammar.json_schema({"type": "array", "minItems": 10**8, "items": {"minLength": 10**9}}),
    "big enum": Grammar.json_schema({"enum": [f"value-{i:06d}" for i in range(3700)]}),
    "itself": Grammar.json_schema({"$ref": "#"}),
    "another host": Grammar.json_schema({"$ref": "http://127.0.0.1:1/schema"}),
    "a file": Grammar.json_schema({"$ref": "file:///etc/passwd"}),
    "two by two by two": Grammar.json_schema(
        {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, 30)} | {"$defs": {}}}
        | {"$ref": "#/$defs/d29"}
    ),
    "look-around": Grammar.regex("(?=a)b"),
    "no lark": Grammar.lark("start: ("),
    "a multiple": Grammar.json_schema({"type": "integer", "multipleOf": 987654321}),
}
STALLING = {
    "patterns that all hold": Grammar.json_schema(
        {"allOf": [{"type": "string", "pattern": f"a.*{i}.*"} for i in range(200)]}
    ),
    "tokens that all hold": Grammar.lark("start: A\nA: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(1, 200))),
}


def test_hostile_grammars_are_refused_or_harmless(compiler: GrammarCompiler) -> None:
    futures = {name: compiler.prepare(grammar) for name, grammar in (HOSTILE | STALLING).items()}
    done, late = wait(futures.values(), timeout=100)
    assert not late and len(done) == len(futures)
    refused = {name for name, future in futures.items() if future.exception() is not None}
    assert all(isinstance(futures[name].exception(), InvalidRequestError) for name in refused)
    assert all("takes more than" in str(futures[name].exception()) for name in STALLING)
    assert {"60,000 groups", "groups in a schema", "groups in lark", "itself", "a file", "another host"} <= refused
    for name in set(HOSTILE) - refused:
        futures[name].result().start().mask()
    assert compiler.compiled(SCHEMA).start().mask().any(), "the compiler works on"


def test_a_future_is_shared_and_at_most_64_grammars_are_kept() -> None:
    compiler = GrammarCompiler(ByteTokenizer(), (257,), 260)
    with patch("nanovllm.engine.grammar.check", return_value=None) as checked:
        first = compiler.prepare(SCHEMA)
        assert compiler.prepare(Grammar.json_schema(PERSON)) is first and not first.cancel()
        for i in range(MAX_KEPT):
            assert compiler.prepare(SCHEMA) is first, "what is used stays"
            compiler.compiled(Grammar.regex(f"a{{{i}}}b"))
        assert checked.call_count == MAX_KEPT + 1
        compiler.compiled(Grammar.regex("a{63}b"))
        compiler.compiled(Grammar.regex("a{0}b"))  # the oldest is gone
        assert checked.call_count == MAX_KEPT + 2
    compiler.close()


def test_one_tenants_grammars_hold_up_nobody_elses() -> None:
    """Two of one namespace at once, however many wait; another's is compiled meanwhile; a flood is refused."""
    compiler, go_on, begun = GrammarCompiler(ByteTokenizer(), (257,), 260), Event(), Semaphore(0)

    def stalling(kind: str, text: str) -> None:
        if text.startswith("bomb"):
            begun.release()
            assert go_on.wait(60)

    with patch("nanovllm.engine.grammar.check", side_effect=stalling) as checked:
        bombs = [compiler.prepare(Grammar.regex(f"bomb{i}"), "mallory") for i in range(MAX_EACH + MAX_WAITING)]
        for _ in range(MAX_EACH):
            assert begun.acquire(timeout=60)
        with pytest.raises(BusyError, match="wait to be compiled"):
            compiler.prepare(Grammar.regex("bomb"), "mallory")
        compiler.compiled(SCHEMA, "alice")
        assert checked.call_count == MAX_EACH + 1 and not any(bomb.done() for bomb in bombs)
        compiler.compiled(SCHEMA, "bob")
        assert checked.call_count == MAX_EACH + 2, "what alice had compiled, bob does not get sooner"
        go_on.set()
        assert not wait(bombs, timeout=60).not_done and compiler.prepare(Grammar.regex("bomb"), "mallory").result()
    compiler.close()


def test_a_refusal_is_not_kept(compiler: GrammarCompiler) -> None:
    with patch("nanovllm.engine.grammar.check", side_effect=["no", None]):
        with pytest.raises(InvalidRequestError, match="refused: no"):
            compiler.compiled(SCHEMA)
        compiler.compiled(SCHEMA)


def test_without_the_package_the_request_is_refused_with_the_command(llm: LLM) -> None:
    with (
        patch("nanovllm.engine.grammar.importlib.util.find_spec", return_value=None),
        pytest.raises(UnsupportedParameterError, match=r"pip install 'nano-vllm-hust\[grammar\]'"),
    ):
        llm.generate(["x"], params(Grammar.regex("never compiled before")))


def test_what_only_this_vocabulary_finds_too_much_is_refused_too(compiler: GrammarCompiler) -> None:
    with patch("nanovllm.engine.grammar.check", return_value=None), pytest.raises(InvalidRequestError, match="regex"):
        compiler.compiled(Grammar.regex("("))


def test_a_tokenizer_that_llguidance_does_not_know_is_said_to_be_one() -> None:
    class Foreign(ByteTokenizer):
        def vocabulary(self) -> Any:
            return "{}"

    with pytest.raises(UnsupportedParameterError, match="tokenizer allows no grammars"):
        GrammarCompiler(Foreign(), (257,), 260).compiled(Grammar.regex("a"))


def test_a_compiler_that_breaks_tells_the_request(compiler: GrammarCompiler) -> None:
    with (
        patch("nanovllm.engine.grammar.check", side_effect=OSError("no more processes")),
        pytest.raises(ExecutionError, match="compiler failed"),
    ):
        compiler.compiled(Grammar.regex("a"))


# -- generating ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_random_model_writes_what_the_schema_wants(llm: LLM, temperature: float) -> None:
    more = {} if temperature == 0 else {"n": 4}
    completions = [
        completion
        for output in llm.generate(["a", "bb", "ccc"], params(SCHEMA, temperature=temperature, **more))
        for completion in output.completions
    ]
    assert {c.finish_reason for c in completions} == {"stop"}
    for completion in completions:
        check_person(completion.text)


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize(
    ("grammar", "is_right"),
    [
        (Grammar.regex(r"[0-9]{3}-[a-f]{2}"), lambda text: re.fullmatch("[0-9]{3}-[a-f]{2}", text)),
        (Grammar.regex("[ab]{2,5}"), lambda text: re.fullmatch("[ab]{2,5}", text)),
        (Grammar.choice(CHOICES), lambda text: text in CHOICES),
        (Grammar.lark('start: "(" start ")" | /[xy]/'), lambda text: text.count("(") == text.count(")")),
    ],
)
def test_every_kind_of_grammar_holds(llm: LLM, grammar: Grammar, is_right: Any, ignore_eos: bool) -> None:
    (output,) = llm.generate(["hi"], params(grammar, n=8, temperature=5.0, ignore_eos=ignore_eos))
    assert len({c.text for c in output.completions}) > 1
    for completion in output.completions:
        assert completion.finish_reason == "stop" and is_right(completion.text), completion.text


def test_json_objects_parse_when_they_end(llm: LLM) -> None:
    """Among random texts few end by themselves: a bias towards the closing brace helps."""
    bias = {ord("}"): 4.0, ord('"'): 5.0}
    (output,) = llm.generate(["hi"], params(Grammar.json_object(), n=8, logit_bias=bias))
    ended = [c.text for c in output.completions if c.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    assert {c.finish_reason for c in output.completions} <= {"stop", "length"}


def test_max_tokens_cuts_and_an_end_is_chosen_only_where_the_grammar_may_end(llm: LLM) -> None:
    forced = {257: 100.0, 259: 100.0}  # whatever may end, ends
    short, cut = llm.generate(
        ["hi", "hi"], [params(Grammar.regex("a{2,50}"), logit_bias=forced), params(SCHEMA, max_tokens=5)]
    )
    assert (short.text, short.finish_reason) == ("aa", "stop") and short.token_ids[-1] in forced
    assert cut.finish_reason == "length" and len(cut.token_ids) == 5 and cut.text == '{"nam'


def test_log_probabilities_stay_the_models_own(llm: LLM) -> None:
    (free,) = llm.generate(["hi"], SamplingParams(temperature=0, max_tokens=1, logprobs=3, ignore_eos=True))
    (bound,) = llm.generate(["hi"], params(Grammar.regex("q"), temperature=0, logprobs=3))
    assert bound.completions[0].logprobs[0][1:] == free.completions[0].logprobs[0][1:]  # type: ignore[index]
    assert bound.completions[0].logprobs[0][0][0] == ord("q")  # type: ignore[index]


VALUES = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -9, "maximum": 99},
            {"type": "string", "pattern": "^[a-c]{0,3}$"},
            {"enum": ["p", 1, None]},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda props: {
                "type": "object", "properties": props, "required": list(props), "additionalProperties": False},
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        ),
    ),
    max_leaves=5,
)  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(fits(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = {"boolean": bool, "null": type(None), "integer": int, "string": str, "array": list, "object": dict}
    if type(value) is not kind[schema["type"]]:
        return False
    if isinstance(value, list):
        return len(value) <= 2 and all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        props = schema["properties"]
        return value.keys() == props.keys() and all(fits(value[name], props[name]) for name in props)
    return not isinstance(value, str) or re.fullmatch("[a-c]{0,3}", value) is not None


@given(schema=VALUES, seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_of_random_schemas_fit_them(llm: LLM, schema: dict[str, Any], seed: int) -> None:
    (output,) = llm.generate(["x"], params(Grammar.json_schema(schema), seed=seed, max_tokens=400, n=2))
    for completion in output.completions:
        assert completion.finish_reason == "stop" and fits(json.loads(completion.text), schema), completion.text


# -- what a request goes through -------------------------------------------------------------------


def texts_of(llm: LLM, num: int = 6) -> list[str]:
    prompts = [f"prompt number {i} of some length" for i in range(num)]
    wanted = [params(SCHEMA, seed=i) if i % 2 else params(Grammar.regex("[ab]{30,60}"), seed=i) for i in range(num)]
    return [output.text for output in llm.generate(prompts, wanted)]


@pytest.mark.parametrize(
    "knobs", [{"num_blocks": 36}, {"max_prefill_chunk": 5}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 7}]
)
def test_preemption_chunks_and_batching_change_no_text(llm: LLM, knobs: dict[str, int]) -> None:
    settings_ = {"dtype": "float32", "block_size": 4, "num_blocks": 200, "check_invariants": True, **knobs}
    with LLM("tiny:random", **settings_) as other:
        if "num_blocks" in knobs:  # admit as if nobody would grow, so that somebody has to give way
            other.engine.scheduler.growth.growth_blocks = lambda seqs: 0  # type: ignore[method-assign]
        assert texts_of(other) == texts_of(llm)
        assert other.engine.scheduler.num_preemptions > 0 or "num_blocks" not in knobs


def half_done(llm: LLM, sampling: SamplingParams) -> tuple[str, list[dict[str, Any]]]:
    request_id = llm.engine.add_request("half", sampling)
    for _ in range(9):
        llm.engine.step()
    return request_id, [
        msgspec.msgpack.decode(msgspec.msgpack.encode(seq.__getstate__()))
        for seq in llm.engine.book.sequences(request_id)
    ]


def test_a_half_written_text_goes_on_elsewhere(llm: LLM) -> None:
    sampling = params(SCHEMA, n=2)
    expected = [c.text for c in llm.generate(["half"], sampling)[0].completions]
    request_id, states = half_done(llm, sampling)
    llm.engine.abort(request_id)
    llm.engine.flush()
    with LLM("tiny:random", dtype="float32", block_size=4, num_blocks=200) as other:
        finals = [out.final for out in other.engine.driver.listen([other.engine.resume(*states)]) if out.final]
    assert [c.text for c in finals[0].completions] == expected
    for text in expected:
        check_person(text)


@pytest.mark.parametrize("change", [lambda ids: [*ids, 0], lambda ids: [*ids[:-1], 257]])
def test_a_state_whose_tokens_do_not_fit_its_grammar_is_refused(llm: LLM, change: Any) -> None:
    request_id, (state,) = half_done(llm, params(SCHEMA))
    llm.engine.abort(request_id)
    llm.engine.flush()
    with pytest.raises(InvalidRequestError, match="do not fit its grammar"):
        llm.engine.resume({**state, "token_ids": change(state["token_ids"])})


def test_an_abort_frees_everything_and_the_others_go_on(llm: LLM) -> None:
    expected = llm.generate(["other"], params(SCHEMA))[0].text
    doomed, _ = half_done(llm, params(SCHEMA, n=2))
    stream = llm.engine.driver.listen([llm.engine.add_request("other", params(SCHEMA))])
    next(stream)
    llm.engine.abort(doomed)
    assert [out.final.text for out in stream if out.final] == [expected]


@pytest.mark.parametrize("fault", ["token", "mask"])
def test_a_token_or_a_mask_that_goes_wrong_fails_its_request_alone(llm: LLM, fault: str) -> None:
    expected = llm.generate(["other"], params(SCHEMA))[0].text
    doomed = llm.engine.add_request("doomed", params(SCHEMA))
    other = llm.engine.add_request("other", params(SCHEMA))
    llm.engine.step()
    (seq,) = llm.engine.book.sequences(doomed)
    constraint = llm.engine.book._outputs[seq].constraint
    if fault == "token":
        assert constraint is not None and not constraint.allows(0)
        real = llm.engine.runner.collect

        def collect(handle: object) -> Any:
            result = real(handle)
            result.token_ids[llm.engine.scheduler.running.index(seq)] = 0
            return result

        with patch.object(llm.engine.runner, "collect", collect):
            llm.engine.step()
    else:
        with patch.object(constraint, "mask", side_effect=InvalidRequestError("too complex", param="grammar")):
            llm.engine.step()
    assert seq.is_finished and seq.finish_reason == "error" and llm.engine.bad_steps_in_a_row == 0
    while llm.engine.is_live(other):
        finals = [out.final for out in llm.engine.step() if out.final]
    assert [final.text for final in finals] == [expected]


# -- the seam --------------------------------------------------------------------------------------


def batch_of_three() -> tuple[list[Sequence], dict[Sequence, Any]]:
    seqs = [Sequence([1, 2, 3], SamplingParams(temperature=0.0, logprobs=1), 4, f"r{i}") for i in range(3)]
    for seq in seqs:
        seq.num_scheduled_tokens, seq.block_table = 3, [0]
    return seqs, {seqs[1]: np.array([0, 1 << 3], np.uint32)}  # token 35 and no other


def test_masks_cross_the_wire() -> None:
    seqs, masks = batch_of_three()
    batch = ExecBatch.build(seqs, masks)
    again = ExecBatch.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(batch.to_wire()))).sampling
    assert again.mask_rows.tolist() == [1] and again.masks.tolist() == [[0, 8]] and again.masks.dtype == np.uint32
    assert ExecBatch.build(seqs).sampling.masks.size == 0


def test_the_sampler_takes_only_what_a_mask_allows() -> None:
    seqs, masks = batch_of_three()
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    logits[1, 69] = 50.0  # beyond the mask's width
    free = Sampler().sample(logits, SamplingBatch.build(seqs))
    bound = Sampler().sample(logits, SamplingBatch.build(seqs, masks))
    assert bound.token_ids.tolist() == [free.token_ids[0], 35, free.token_ids[2]] and free.token_ids[1] == 69
    assert bound.logprobs[1][1] == free.logprobs[1][1]  # type: ignore[index]
    nothing = SamplingBatch.build(seqs, {seqs[1]: np.zeros(2, np.uint32)})
    assert Sampler().sample(logits, nothing).token_ids[1] == -1, "nothing allowed: the row has no token"


def test_every_end_token_ends_a_grammar_that_may_end(compiler: GrammarCompiler) -> None:
    constraint = compiler.compiled(Grammar.regex("ab?")).start()
    allowed = lambda: set(np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")))  # noqa: E731
    assert allowed() == {ord("a")}
    constraint.accept(ord("a"))
    assert allowed() == {ord("b"), 257, 259} and not constraint.is_complete
    constraint.accept(259)
    assert constraint.is_complete and not constraint.allows(ord("b"))


def test_a_real_model_answers_in_json(smollm2_path: Path) -> None:
    with LLM(str(smollm2_path), num_blocks=64, enforce_eager=True) as llm:
        question = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
        for sampling in (params(SCHEMA, temperature=0), params(SCHEMA, n=2)):
            output = llm.chat(question, sampling)[0]
            for completion in output.completions:
                assert completion.finish_reason == "stop"
                check_person(completion.text)
        (output,) = llm.generate(["Is water wet?"], params(Grammar.choice(CHOICES)))
        assert output.text in CHOICES
