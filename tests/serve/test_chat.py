"""POST /v1/chat/completions against a live server."""

from __future__ import annotations

import json

import msgspec
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.serve import replies
from tests.serve.surface import HI, Live

GREEDY = {"temperature": 0, "max_tokens": 24}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}


def message_of(live: Live, **fields: object) -> replies.ChatReply:
    answer = live.chat(**fields)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=replies.ChatReply)  # strict: the document is what is sent


def test_an_answer_has_every_field(tiny: Live) -> None:
    reply = message_of(tiny, **GREEDY, model="tiny:random")
    assert reply.model == "tiny:random" and reply.id.startswith("chatcmpl-")
    assert reply.choices[0].finish_reason == "length" and reply.choices[0].logprobs is None
    assert reply.usage.completion_tokens == 24 and reply.usage.total_tokens == reply.usage.prompt_tokens + 24


def test_the_answer_is_the_offline_engines(tiny: Live) -> None:
    with LLM("tiny:random", dtype="float32", num_blocks=64) as llm:
        output = llm.chat(HI, SamplingParams(temperature=0, max_tokens=24))[0]
    assert message_of(tiny, **GREEDY).choices[0].message.content == output.text
    assert tiny.ask("/tokenize", {"messages": HI}).json()["tokens"] == output.prompt_token_ids


def test_a_repeated_prompt_is_cached_and_says_so(tiny: Live) -> None:
    messages = [{"role": "user", "content": "the same again, long enough for several blocks of tokens"}]
    first = message_of(tiny, messages=messages, **GREEDY)
    again = message_of(tiny, messages=messages, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens_details.cached_tokens
    assert again.choices[0].message == first.choices[0].message
    salted = message_of(tiny, messages=messages, **GREEDY, cache_salt="mine")
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_n_samples_of_one_prompt(tiny: Live) -> None:
    reply = message_of(tiny, n=4, seed=7, max_tokens=16)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in reply.choices}) == 4
    assert reply.usage.completion_tokens == 64
    assert message_of(tiny, n=4, seed=7, max_tokens=16).choices == reply.choices


def test_text_parts_and_every_role(tiny: Live) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = tiny.ask("/tokenize", {"messages": [{"role": "user", "content": "one\ntwo"}]}).json()
    assert tiny.ask("/tokenize", {"messages": [{"role": "user", "content": parts}]}).json() == joined
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u", "name": None},
        {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "v"},
    ]
    assert tiny.chat(messages, max_tokens=1).status_code == 200


def test_nulls_mean_absent(tiny: Live) -> None:
    from nanovllm.serve.protocol import ChatRequest

    nulls = dict.fromkeys(set(ChatRequest.__struct_fields__) - {"messages", "max_tokens"})
    assert tiny.chat(max_tokens=1, **nulls).status_code == 200


def test_hints_change_nothing(tiny: Live) -> None:
    hints = {"user": "u", "safety_identifier": "s", "service_tier": "auto", "metadata": {"a": "b"}, "store": False}
    hints |= {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "session_id": "x"}
    assert message_of(tiny, **GREEDY, **hints).choices == message_of(tiny, **GREEDY).choices


def test_logprobs_come_with_each_token(tiny: Live) -> None:
    reply = message_of(tiny, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob  # greedy
    text = bytes(byte for entry in content for byte in entry.bytes).decode(errors="replace")
    assert text == reply.choices[0].message.content
    alone = message_of(tiny, temperature=0, max_tokens=6, logprobs=True)
    assert [entry.top_logprobs for entry in alone.choices[0].logprobs.content] == [[]] * 6


def test_stop_strings_end_an_answer(tiny: Live) -> None:
    whole = message_of(tiny, **GREEDY).choices[0].message.content
    stop = whole[8:10]
    reply = message_of(tiny, **GREEDY, stop=[stop]).choices[0]
    assert reply.finish_reason == "stop" and reply.message.content == whole[: whole.index(stop)]
    shown = message_of(tiny, **GREEDY, stop=stop, include_stop_str_in_output=True).choices[0]
    assert shown.message.content == reply.message.content + stop


def test_max_tokens_is_at_most_what_the_context_holds(tiny: Live) -> None:
    messages = [{"role": "user", "content": "x" * 1900}]
    room = 2048 - message_of(tiny, messages=messages, max_tokens=1).usage.prompt_tokens
    reply = message_of(tiny, messages=messages, ignore_eos=True, max_tokens=2**31)
    assert reply.usage.completion_tokens == room and reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_enforced(tiny: Live, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    body = {"messages": HI, "response_format": form, "max_tokens": 200, "n": 3, "seed": 1}
    if stream:
        events = tiny.events("/v1/chat/completions", body)[:-1]
        texts = ["".join(text_of(event, index) for event in events) for index in range(3)]
    else:
        texts = [choice["message"]["content"] for choice in tiny.chat(**body).json()["choices"]]
    for text in texts:
        value = json.loads(text)
        assert value["city"] in ("Paris", "Rome") and isinstance(value["warm"], bool)


def text_of(event: dict, index: int) -> str:
    return "".join(choice["delta"].get("content", "") for choice in event["choices"] if choice["index"] == index)


def test_any_json_object(tiny: Live) -> None:
    choice = message_of(tiny, response_format={"type": "json_object"}, max_tokens=400, seed=4).choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("kind", "value", "allowed"),
    [("choice", ["yes", "no"], "yes|no"), ("regex", "[ab]{3}", "[ab]{3}"), ("grammar", 'start: "x" "y"', "xy")],
)
def test_structured_outputs(tiny: Live, kind: str, value: object, allowed: str) -> None:
    import re

    content = message_of(tiny, structured_outputs={kind: value}, max_tokens=20).choices[0].message.content
    assert re.fullmatch(allowed, content)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "bogus"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "("}}}},
        {"structured_outputs": {"regex": "(("}},
        {"structured_outputs": {"grammar": "start: nowhere"}},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_cannot_be_compiled_names_its_field(tiny: Live, fields: dict, stream: bool) -> None:
    answer = tiny.chat(**fields, stream=stream, max_tokens=4)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(next(iter(fields)))
