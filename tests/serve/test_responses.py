"""/v1/responses through OpenAI's client: turns that the server keeps, continues, tells of and deletes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import pytest
from openai import BadRequestError, InternalServerError, NotFoundError, OpenAI

from nanovllm.serve import conversations, responses
from nanovllm.serve.openapi import document
from nanovllm.serve.response_protocol import ResponseRequest
from nanovllm.serve.response_replies import CacheReason, MissReason
from nanovllm.serve.turn_history import DELETED, NOT_KEPT, OPENAI, REASONS, REWRITTEN
from tests.serve.openai_clients import ASKED, BLOCK, LETTERS, Clients, ai, ask, clients, own
from tests.serve.servers import LiveServer, assert_at_rest
from tests.serve.surface import Live

__all__ = ["ai", "clients"]  # fixtures
DOCUMENT = document()
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}


def is_documented(name: str, value: Any) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema_rs.validator_for(schema).is_valid(value)


def test_a_turn_is_kept_continued_and_given_back(ai: OpenAI) -> None:
    first = ask(ai, "Good morning, server.", metadata={"who": "me"}, instructions="Be brief.")
    assert first.id.startswith("resp_") and len(first.id) == 53 and first.object == "response"
    assert (first.status, first.metadata, first.store) == ("incomplete", {"who": "me"}, True)
    assert first.incomplete_details.reason == "max_output_tokens" and first.output[0].status == "incomplete"
    assert first.usage.output_tokens == 12 and first.usage.total_tokens == first.usage.input_tokens + 12
    assert ai.responses.retrieve(first.id) == first
    again = ask(ai, "And now?", previous_response_id=first.id, instructions="Be brief.")
    assert again.previous_response_id == first.id and again.usage.input_tokens > first.usage.total_tokens
    listed = list(ai.responses.input_items.list(again.id, order="asc"))
    assert [item.role for item in listed] == ["user", "assistant", "user"]
    assert listed[1].content[0].text == first.output_text and listed[1].id == first.output[0].id
    assert [i.id for i in ai.responses.input_items.list(again.id, limit=2)] == [i.id for i in reversed(listed)]
    only = ai.responses.input_items.list(again.id, order="asc", after=listed[0].id, limit=1)
    assert only.data == [listed[1]] and only.has_more


def test_the_next_turn_finds_the_tokens_of_the_one_before(ai: OpenAI) -> None:
    """Its prompt and its answer."""
    before = ask(ai, "A turn with a few words in it.", max_output_tokens=40, text=LETTERS)
    for number in range(4):
        after = ask(ai, f"Word {number}.", previous_response_id=before.id, text=LETTERS, max_output_tokens=20 + number)
        whole = (before.usage.total_tokens - 1) // BLOCK * BLOCK
        assert after.usage.input_tokens_details.cached_tokens >= whole > 0
        assert own(after)["reusable_tokens"] == before.usage.total_tokens
        assert own(after)["miss_reason"] is None and own(after)["hit_tokens_by_tier"]["device"] >= whole
        assert after.prompt_cache_diagnostics.type == "cache_hit"
        before = after


def test_a_miss_has_its_reason_in_openais_words(ai: OpenAI, tiny: Live) -> None:
    text = "Something that is long enough to fill blocks."
    first = ask(ai, text, instructions="One.", max_output_tokens=30, text=LETTERS)
    others: list[tuple[dict[str, Any], str, list[str]]] = [
        ({"instructions": "Two."}, "input_changed", ["instructions"]),
        ({}, "input_changed", ["instructions"]),
        ({"instructions": "One.", "tools": [WEATHER]}, "tools_changed", ["tools"]),
        ({"instructions": "Two.", "tools": [WEATHER]}, "tools_changed", ["tools", "instructions"]),
    ]
    for fields, reason, changed in others:
        answer = ask(ai, "Go on.", previous_response_id=first.id, **fields)
        found = answer.prompt_cache_diagnostics
        assert (found.type, found.reason) == ("cache_miss", reason)
        assert own(answer)["changed"] == changed and own(answer)["miss_reason"] == reason
        assert found.comparison_reusable_tokens == own(answer)["reusable_tokens"] < first.usage.total_tokens
        assert found.cache_missed_tokens == answer.usage.input_tokens - found.comparison_reusable_tokens
    same = ask(ai, "Go on.", previous_response_id=first.id, instructions="One.", text={"format": {"type": "text"}})
    assert same.prompt_cache_diagnostics.type == "cache_hit" and own(same)["changed"] == []


def test_a_stream_is_the_official_sequence_and_joins_to_the_whole(ai: OpenAI, tiny: Live) -> None:
    whole = ask(ai, "Say something.", max_output_tokens=30)
    events = list(ask(ai, "Say something.", max_output_tokens=30, stream=True))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type for event in events]
    opening = ["created", "in_progress", "output_item.added", "content_part.added"]
    closing = ["output_text.done", "content_part.done", "output_item.done", whole.status]
    assert kinds[:4] == [f"response.{kind}" for kind in opening]
    assert kinds[-4:] == [f"response.{kind}" for kind in closing]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(event.delta for event in events[4:-4])
    assert text == events[-4].text == events[-1].response.output_text == whole.output_text
    assert ai.responses.retrieve(events[0].response.id) == events[-1].response
    raw = tiny.ask("/v1/responses", {**ASKED, "input": "Say.", "stream": True}).text
    frames = [frame.split("\ndata: ") for frame in raw.strip().split("\n\n")]
    assert all(head == f"event: {json.loads(data)['type']}" for head, data in frames)
    assert all(is_documented("ResponseEvent", json.loads(data)) for _, data in frames)
    forced = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    with ai.responses.stream(**{**ASKED, **forced}, input="Rome?") as helped:  # it insists on response.completed
        assert json.loads(helped.get_final_response().output[0].arguments)["city"] in ("Rome", "Oslo")


def test_answers_are_as_documented(tiny: Live) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "required"}, {"store": False}, {"seed": 1, "top_k": 5}):
        answer = tiny.ask("/v1/responses", {**ASKED, "input": "x", "max_output_tokens": 60, **fields})
        assert answer.status_code == 200, answer.text
        assert is_documented("ResponseReply", answer.json()), answer.text
    kept = tiny.ask("/v1/responses", {**ASKED, "input": "x"}).json()["id"]
    assert is_documented("ResponseReply", tiny.http.get(f"/v1/responses/{kept}").json())
    assert is_documented("ItemsReply", tiny.http.get(f"/v1/responses/{kept}/input_items").json())
    assert is_documented("DeletedReply", tiny.http.delete(f"/v1/responses/{kept}").json())


def test_functions_are_called_and_answered(ai: OpenAI) -> None:
    forced = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    first = ask(ai, "The weather in Rome?", **forced)
    assert [item.type for item in first.output] == ["function_call"] and first.status == "completed"
    call = first.output[0]
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}
    after = ask(ai, [result], previous_response_id=first.id, tools=[WEATHER])
    items = list(ai.responses.input_items.list(after.id, order="asc"))
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]
    events = list(ask(ai, "The weather in Rome?", **forced, stream=True))
    told = [event.type.removeprefix("response.") for event in events]
    assert told[2:-1] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert events[3].delta == events[4].arguments == events[5].item.arguments
    named = ask(ai, "x", tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, max_output_tokens=200)
    assert named.output[0].type == "function_call"


def test_a_schema_binds_the_text(ai: OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    answer = ask(ai, "A number.", text=wanted, max_output_tokens=100)
    assert json.loads(answer.output_text)["a"] in (1, 2) and answer.status == "completed"
    assert answer.text.format.name == "x"


def test_what_is_not_stored_is_not_there(ai: OpenAI) -> None:
    answer = ask(ai, "Forget this.", store=False)
    assert answer.store is False
    with pytest.raises(NotFoundError) as caught:
        ai.responses.retrieve(answer.id)
    assert caught.value.body["param"] == "response_id"
    with pytest.raises(NotFoundError) as caught:
        ask(ai, "More.", previous_response_id=answer.id)
    assert (caught.value.body["param"], caught.value.code) == ("previous_response_id", "state_not_found")


def test_a_response_outlives_the_one_that_it_continued(ai: OpenAI) -> None:
    first = ask(ai, "One.")
    second = ask(ai, "Two.", previous_response_id=first.id)
    assert ai.responses.delete(first.id) is None
    for gone in (lambda: ai.responses.retrieve(first.id), lambda: ai.responses.delete(first.id)):
        with pytest.raises(NotFoundError):
            gone()
    third = ask(ai, "Three.", previous_response_id=second.id)
    texts = [i.content[0].text for i in ai.responses.input_items.list(third.id, order="asc")]
    assert texts == ["One.", first.output_text, "Two.", second.output_text, "Three."]
    assert own(third)["miss_reason"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_x", "conversation": "conv_x"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": "a\0b"}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "x"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": ""}] * 2049}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]}, "input[0].content"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}}, "text.format"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 1, "min_tokens": 2}, "min_tokens"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"prompt_cache_key": ""}, "prompt_cache_key"),
        ({"input": "x" * 100_000}, "input"),
        ({"input": "x" * 20_000}, "input"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tiny: Live, fields: dict[str, Any], param: str) -> None:
    answer = tiny.ask("/v1/responses", {**ASKED, "input": "x", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert_at_rest(tiny.server)


def test_ids_that_are_none_are_not_there(ai: OpenAI, tiny: Live) -> None:
    for bad in ("x", "resp_" + "0" * 48, "resp_../x", "resp_" + "A" * 48, "conv_" + "0" * 32, "name@1"):
        with pytest.raises(NotFoundError):
            ask(ai, "x", previous_response_id=bad)
        with pytest.raises(NotFoundError):
            ask(ai, "x", conversation=bad)
        assert tiny.http.get(f"/v1/responses/{bad}").status_code == 404
    assert_at_rest(tiny.server)


def test_a_query_that_is_not_understood_is_refused(ai: OpenAI, tiny: Live) -> None:
    """Nothing is left unsaid: neither a stream of what is stored nor a parameter that does not exist."""
    kept, talk = ask(ai, "x").id, ai.conversations.create(items=[{"role": "user", "content": "x"}]).id
    [item] = ai.conversations.items.list(talk)
    with pytest.raises(BadRequestError) as caught:
        ai.responses.retrieve(kept, stream=True)
    assert caught.value.body["param"] == "stream" and "whole" in caught.value.message
    assert ai.responses.retrieve(kept, stream=False, include=["reasoning.encrypted_content"]).id == kept
    refused = [
        ("GET", f"/v1/responses/{kept}", "starting_after=3", "starting_after"),
        ("GET", f"/v1/responses/{kept}", "include[]=file_search_call.results", "include"),
        ("GET", f"/v1/responses/{kept}/input_items", "include=message.input_image.image_url", "include"),
    ]
    paths = {"response_id": kept, "conversation_id": talk, "item_id": item.id}
    for route in (*responses.ROUTES, *conversations.ROUTES):
        for method in route.methods - {"HEAD"}:
            refused.append((method, route.path.format(**paths), "x=1", "x"))
    for method, path, query, param in refused:
        body = {"content": b"{}", "headers": {"content-type": "application/json"}} if method == "POST" else {}
        answer = tiny.http.request(method, f"{path}?{query}", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (method, path, answer.text)
    assert ai.responses.retrieve(kept).id == kept and ai.conversations.items.list(talk).data == [item]


SHOUTING = """<|bos|>{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | upper if m.role == 'assistant' else m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


def test_a_template_that_alters_history_is_a_miss_with_its_reason(
    fresh_server: Callable[..., LiveServer], clients: Clients
) -> None:
    """Reasoning that templates strip is the usual case: the prompt up to it is found, the rest is not."""
    live = fresh_server(num_blocks=256)
    live.services.engine.tokenizer.chat_template = SHOUTING
    ai = clients(live)
    first = ask(ai, "Something that is long enough to fill some blocks.", max_output_tokens=40, text=LETTERS)
    after = ask(ai, "On.", previous_response_id=first.id, text=LETTERS)
    assert (own(after)["miss_reason"], own(after)["changed"]) == ("history_rewritten", [])
    reusable = own(after)["reusable_tokens"]
    assert reusable >= first.usage.input_tokens and reusable < first.usage.total_tokens
    assert after.usage.input_tokens_details.cached_tokens == reusable // BLOCK * BLOCK
    third = ask(ai, "On.", previous_response_id=after.id, text=LETTERS)
    assert own(third)["reusable_tokens"] >= after.usage.input_tokens, "what was altered once is found from then on"


def test_another_model_on_the_same_folder_says_so(
    tmp_path: Path, fresh_server: Callable[..., LiveServer], clients: Clients
) -> None:
    live = fresh_server(num_blocks=256, state_dir=str(tmp_path), dtype="float32")
    first = ask(clients(live), "Something that fills some blocks with tokens.", text=LETTERS, max_output_tokens=40)
    live.stop()
    live = fresh_server(num_blocks=256, state_dir=str(tmp_path), dtype="bfloat16")
    after = ask(clients(live), "On.", previous_response_id=first.id, text=LETTERS)
    assert after.usage.input_tokens_details.cached_tokens == 0 and after.status == "incomplete"
    assert own(after)["miss_reason"] == "model_changed" and after.prompt_cache_diagnostics.reason == "model_changed"


def test_kv_that_was_not_kept_is_told_apart_from_another_prompt(
    fresh_server: Callable[..., LiveServer], clients: Clients
) -> None:
    live = fresh_server(num_blocks=24)
    ai = clients(live)
    first = ask(ai, "Something that fills some blocks with tokens.", text=LETTERS, max_output_tokens=40)
    for number in range(4):
        ask(ai, str(number) * 250, store=False)
    after = ask(ai, "On.", previous_response_id=first.id, text=LETTERS)
    assert own(after)["miss_reason"] == "kv_not_kept" and after.prompt_cache_diagnostics.type == "unavailable"
    assert own(after)["reusable_tokens"] == first.usage.total_tokens


def test_limits_and_deadlines_are_a_chats(fresh_server: Callable[..., LiveServer], clients: Clients) -> None:
    live = fresh_server(num_blocks=256, request_timeout=0.3, max_queued_tokens=300)
    more = {"input": "x", "extra_body": {"ignore_eos": True}, "max_output_tokens": 1900, "model": "tiny:random"}
    with pytest.raises(InternalServerError) as caught:
        clients(live).responses.create(**more)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    frames = live.ask("POST", "/v1/responses", {**ASKED, "input": "x", "max_output_tokens": 1900, "ignore_eos": True,
                                               "stream": True}).body.decode().strip().split("\n\n")  # fmt: skip
    assert [frame.split("\n")[0] for frame in frames[-2:]] == ["event: response.failed", "event: error"]
    failed = json.loads(frames[-2].split("\ndata: ")[1])["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
    assert live.get(f"/v1/responses/{failed['id']}").status == 404, "what failed is not kept"
    assert_at_rest(live)


def test_a_session_is_named_by_field_or_header_and_adds_no_message(tiny: Live, monkeypatch: Any) -> None:
    heard: list[str] = []
    submit = tiny.services.engine.submit

    def listen(*args: Any, **kwargs: Any) -> Any:
        heard.append(kwargs["session_id"])
        return submit(*args, **kwargs)

    monkeypatch.setattr(tiny.services.engine, "submit", listen)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    said = (("/v1/chat/completions", chat), ("/v1/responses", {**ASKED, "input": "hi", "store": False}))
    for path, body in (*said, ("/v1/completions", {"prompt": "hi", "max_tokens": 2})):
        plain = tiny.ask(path, body).json()["usage"]
        for fields, headers in (
            ({"session_id": "s1"}, {}),
            ({}, {"X-Session-ID": "s1"}),
            ({"session_id": "s1"}, {"X-Session-ID": "s1"}),
            ({"prompt_cache_key": "s1"}, {}),
            ({"session_id": "s1", "prompt_cache_key": "s2"}, {}),
        ):
            answer = tiny.ask(path, {**body, **fields}, headers=headers)
            assert answer.status_code == 200 and heard[-1] == "s1"
            sizes = [usage.get("input_tokens", usage.get("prompt_tokens")) for usage in (plain, answer.json()["usage"])]
            assert sizes[0] == sizes[1]
        differ = tiny.ask(path, {**body, "session_id": "a"}, headers={"X-Session-ID": "b"})
        assert (differ.status_code, differ.json()["error"]["param"]) == (400, "session_id")
        for bad in ("", "x" * 129, "a b", "\u00e9".encode("latin-1").decode("latin-1")):
            refused = tiny.ask(path, body, headers={"X-Session-ID": bad.encode("latin-1")})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-Session-ID"), bad
        assert tiny.ask(path, {**body, "session_id": "x" * 129}).json()["error"]["param"] == "session_id"


@pytest.mark.parametrize("page", ["sessions.md", "sessions.zh.md"])
def test_the_pages_name_every_field_path_and_reason(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    assert [name for name in ResponseRequest.__struct_fields__ if f"`{name}`" not in text] == []
    for route in (*responses.ROUTES, *conversations.ROUTES):
        path = re.sub(r"{(response|conversation)_id}", "{id}", route.path)
        assert f" {path}`" in text or f" {path}?" in text, path
    reasons = {word for _, word in REASONS} | {DELETED, REWRITTEN, NOT_KEPT}
    assert all(f"| `{reason}` |" in text for reason in reasons)
    told, own_words = (set(get_args(part)) for part in get_args(MissReason))
    assert told | own_words == reasons and told == {*OPENAI} == set(get_args(CacheReason))
    assert all(f"`{name}`" in text.split("nanovllm.changed", 1)[1].split("\n", 1)[0] for name, _ in REASONS)


def test_a_kept_turn_owns_its_kv_itself(tiny: Live, ai: OpenAI, monkeypatch: Any) -> None:
    """A hint would own it beside, and a deletion would leave it."""
    heard: list[str] = []
    submit = tiny.services.engine.submit

    def listen(*args: Any, **kwargs: Any) -> Any:
        heard.append(kwargs["session_id"])
        return submit(*args, **kwargs)

    monkeypatch.setattr(tiny.services.engine, "submit", listen)
    ask(ai, "x", prompt_cache_key="mine")
    ask(ai, "x", conversation=ai.conversations.create().id, store=False, prompt_cache_key="mine")
    assert heard == ["", ""]


def test_a_turn_that_is_too_large_to_keep_says_so(fresh_server: Callable[..., LiveServer], clients: Clients) -> None:
    live = fresh_server(num_blocks=256, max_tenant_session_bytes=3000)
    ai = clients(live)
    talk = ai.conversations.create()
    ask(ai, "x" * 400, conversation=talk.id)
    for attempt in (lambda: ask(ai, "x"), lambda: ask(ai, "x", conversation=talk.id, store=False)):
        with pytest.raises(InternalServerError) as caught:
            attempt()
        assert (caught.value.status_code, caught.value.code) == (507, "session_quota")
    assert ask(ai, "x", store=False).status == "incomplete"


def test_chat_and_completions_tell_the_tiers_too(tiny: Live) -> None:
    chat = {"messages": [{"role": "user", "content": "a chat that fills a few blocks with tokens"}], "max_tokens": 1}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "y" * 40, "max_tokens": 1})):
        usages = [tiny.ask(path, body).json()["usage"] for _ in range(2)]
        cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
        assert cached > 0 and usages[1]["nanovllm"] == {"hit_tokens_by_tier": {"device": cached}}
        last = tiny.events(path, {**body, "stream_options": {"include_usage": True}})[-2]
        assert last["usage"]["nanovllm"]["hit_tokens_by_tier"] == {"device": cached}
