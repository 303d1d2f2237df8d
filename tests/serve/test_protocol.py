"""Bodies, strictly decoded: what is refused, and which field the refusal names."""

from __future__ import annotations

import json
import re

import msgspec
import pytest

from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.decode import _ELSEWHERE_CALLED, decode, depth_of
from nanovllm.serve.protocol import HINTS, REQUESTS, ChatRequest, CompletionRequest, DetokenizeRequest, refused_fields

USER = {"role": "user", "content": "hi"}
DEPTH = 64


def refusal(body: object, kind: type = ChatRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        decode(body if isinstance(body, bytes) else json.dumps(body).encode(), kind, DEPTH)
    return caught.value


def chat(**fields: object) -> dict:
    return {"messages": [USER], **fields}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "100"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": "1"}, "max_completion_tokens"),
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.0000001}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 1e9}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages"),
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"n": 1}}}, "response_format.json_schema.n"),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields: dict, param: str) -> None:
    error = refusal(chat(**fields))
    assert (error.status, error.param) == (400, param), error
    assert param in error.message


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
def test_numbers_beyond_a_double(number: str) -> None:
    error = refusal(b'{"messages":[{"role":"user","content":"hi"}],"temperature":%b}' % number.encode())
    assert error.param == "temperature"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"hello",
        b'{"messages":NaN}',
        b'{"temperature":NaN}',
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"\\ud800x"}]}',
        b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert refusal(body).status == 400


@pytest.mark.parametrize(("depth", "is_refused"), [(60, False), (100, True), (900, True), (100_000, True)])
def test_nesting_is_bounded(depth: int, is_refused: bool) -> None:
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    body = b'{"messages":[{"role":"user","content":"hi"}],"chat_template_kwargs":%b}' % nested
    if is_refused:
        assert "nested" in refusal(body).message
    else:
        decode(body, ChatRequest, DEPTH)


@pytest.mark.parametrize("depth", [0, 1, 5, 40])
def test_depth_is_measured(depth: int) -> None:
    value: object = 1
    for turn in range(depth):
        value = {"a": value} if turn % 2 else [value]
    assert depth_of(value, 30) == min(depth, 31)


@pytest.mark.parametrize(
    ("field", "hint"), [("max_tokns", "max_tokens"), ("temprature", "temperature"), ("qqqq", None), ("x" * 9999, None)]
)
def test_an_unknown_field_is_refused_with_the_nearest(field: str, hint: str | None) -> None:
    error = refusal(chat(**{field: 1}))
    assert isinstance(error, UnsupportedParameterError) and error.param == field[:60]
    assert f"Did you mean {hint}?" in str(error) if hint else "Did you mean" not in str(error)


@pytest.mark.parametrize(
    ("kind", "field", "hint"),
    [
        (ChatRequest, "n_predict", "Did you mean max_tokens?"),
        (ChatRequest, "repeat_penalty", "Did you mean repetition_penalty?"),
        (ChatRequest, "grammar", "Did you mean structured_outputs?"),
        (ChatRequest, "enable_thinking", "Did you mean chat_template_kwargs?"),
        (CompletionRequest, "enable_thinking", "It would be ignored, so it is refused."),
        (ChatRequest, "return_token_ids", "It would be ignored, so it is refused."),  # not stop_token_ids
        (ChatRequest, "prompt", "POST /v1/completions takes it."),
        (CompletionRequest, "messages", "POST /v1/chat/completions takes it."),
        (CompletionRequest, "inputs", "Did you mean prompt?"),
    ],
)
def test_who_comes_from_another_server_is_shown_the_way(kind: type, field: str, hint: str) -> None:
    required = {"messages": [USER]} if kind is ChatRequest else {"prompt": "x"}
    assert refusal(required | {field: 1}, kind).hint == hint


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_no_hint_leads_to_another_refusal(kind: type) -> None:
    required = {"messages": [USER]} if kind is ChatRequest else {"prompt": "x"}
    for name in (*_ELSEWHERE_CALLED, "guided_jsn", "sufix", "prompt_embed", "predict", "truncate_prompt_token"):
        hint = refusal(required | {name: 1}, kind).hint or ""
        found = re.fullmatch(r"Did you mean (\w+)\?", hint)
        assert found is None or found[1] in set(kind.__struct_fields__) - refused_fields(kind).keys()


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_fields_of_other_servers_are_refused_and_explained(kind: type) -> None:
    required = {"messages": [USER]} if kind is ChatRequest else {"prompt": "x"}
    refused = refused_fields(kind)
    assert len(refused) > 10
    for name, why in refused.items():
        error = refusal(required | {name: {"a": 1}}, kind)
        assert isinstance(error, UnsupportedParameterError) and error.param == name and why in str(error)
        decode(json.dumps(required | {name: None}).encode(), kind, DEPTH)


def test_hints_are_accepted() -> None:
    values = dict.fromkeys(HINTS, "x") | {"metadata": {"a": 1}}
    assert decode(json.dumps(chat(**values)).encode(), ChatRequest, DEPTH).user == "x"


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_optional_field_takes_null(kind: type) -> None:
    required = {"messages": [USER], "prompt": "x", "tokens": [1]}
    optional = [f.encode_name for f in msgspec.structs.fields(kind) if not f.required]
    body = dict.fromkeys(optional) | {f.name: required[f.name] for f in msgspec.structs.fields(kind) if f.required}
    assert decode(json.dumps(body).encode(), kind, DEPTH)


@pytest.mark.parametrize("tokens", [[-1], [2**40], ["1"], [1.5], [True], "x", None])
def test_token_ids_are_whole_numbers(tokens: object) -> None:
    assert refusal({"tokens": tokens}, DetokenizeRequest).param.startswith("tokens")


def test_the_last_of_equal_keys_counts() -> None:
    body = b'{"messages":[{"role":"user","content":"hi"}],"n":1,"n":2}'
    assert decode(body, ChatRequest, DEPTH).n == 2
