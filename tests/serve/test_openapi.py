"""The OpenAPI document: complete, valid, and true of the decoder and of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.serve import protocol
from nanovllm.serve.app import ROUTES
from nanovllm.serve.dashboard.feed import FEED_PATH
from nanovllm.serve.dashboard.pages import PAGE_PATHS
from nanovllm.serve.decode import decode
from nanovllm.serve.openapi import REFUSALS, document
from tests.serve.surface import HI, Live

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def validator(name: str) -> Any:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema_rs.validator_for(schema)


def test_it_is_served(tiny: Live) -> None:
    assert tiny.http.get("/openapi.json").json() == json.loads(json.dumps(DOCUMENT))


def test_every_route_is_in_it() -> None:
    paths = {route.path.replace(":path", "") for route in ROUTES}
    assert paths - set(DOCUMENT["paths"]) == {"/openapi.json", "/metrics", FEED_PATH, *PAGE_PATHS}
    assert set(DOCUMENT["paths"]) <= paths
    for route in ROUTES:
        methods = {method.lower() for method in route.methods or ()} - {"head"}
        documented = DOCUMENT["paths"].get(route.path.replace(":path", ""))
        assert documented is None or methods <= set(documented), route.path


def test_references_lead_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part[: part.index('"')] in SCHEMAS


@pytest.mark.parametrize("path", [path for path, methods in DOCUMENT["paths"].items() if "post" in methods])
def test_every_refusal_is_documented(path: str) -> None:
    assert set(DOCUMENT["paths"][path]["post"]["responses"]) == {"200", *REFUSALS}


@pytest.mark.parametrize("kind", protocol.REQUESTS)
def test_hints_and_refused_fields_are_said(kind: type) -> None:
    properties = SCHEMAS[kind.__name__]["properties"]
    assert SCHEMAS[kind.__name__]["additionalProperties"] is False
    if issubclass(kind, protocol.Hints):
        assert all(properties[name]["description"] == "accepted, without effect" for name in protocol.HINTS)
    for name in protocol.refused_fields(kind):
        assert properties[name]["type"] == "null" and "not supported" in properties[name]["description"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 16},
        {"n": 17},
        {"n": 0},
        {"temperature": 100},
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_p": 1},
        {"stop": "x"},
        {"stop": ["x"] * 5},
        {"stop": ""},
        {"logit_bias": {"1": 1}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tool_choice": "auto"},
        {"tool_choice": "sometimes"},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema"}},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"user": None, "audio": None},
        {"audio": {}},
        {"bogus": 1},
    ],
)
def test_the_document_and_the_decoder_agree(fields: dict) -> None:
    body = {"messages": HI, **fields}
    try:
        decode(json.dumps(body).encode(), protocol.ChatRequest, 64)
        is_taken = True
    except InvalidRequestError:
        is_taken = False
    assert validator("ChatRequest").is_valid(body) == is_taken


def test_answers_are_as_documented(tiny: Live) -> None:
    asked = {"max_tokens": 4, "logprobs": True, "n": 2}
    assert validator("ChatReply").is_valid(tiny.chat(**asked).json())
    for event in tiny.events("/v1/chat/completions", {"messages": HI, **asked})[:-1]:
        assert validator("ChatChunk").is_valid(event)
    assert validator("TextReply").is_valid(tiny.complete("x", logprobs=1).json())
    assert validator("ErrorReply").is_valid(tiny.complete("").json())
    assert validator("ModelsReply").is_valid(tiny.http.get("/v1/models").json())
    assert validator("TokenizeReply").is_valid(tiny.ask("/tokenize", {"prompt": "x"}).json())


def test_the_operators_answers_are_as_documented(tiny: Live) -> None:
    """Strict schemas: a field that is told and not documented fails here."""
    kept = tiny.ask("/state/objects", {"text": "x", "metadata": {"name": "shown", "version": "1"}}).json()
    path = f"/state/objects/{kept['state_id']}"
    assert validator("Receipt").is_valid(kept)
    for name, reply in (
        ("ObjectsReply", tiny.http.get("/state/objects")),
        ("WholeObjectReply", tiny.http.get(path)),
        ("Explanation", tiny.http.get(f"{path}/explain")),
        ("TiersReply", tiny.http.get("/state/tiers")),
        ("StateErrorReply", tiny.ask(f"{path}/pin", {})),
        ("StateErrorReply", tiny.http.get("/state/objects/nobody")),
        ("Receipt", tiny.http.put(path, json={"text": "y", "generation": 1})),
        ("Receipt", tiny.http.delete(path)),
    ):
        assert validator(name).is_valid(reply.json()), (name, reply.text)


@pytest.mark.parametrize("page", ["server.md", "server.zh.md"])
def test_the_pages_name_every_field(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    for kind in (protocol.ChatRequest, protocol.CompletionRequest):
        for name in kind.__struct_fields__:
            assert f"`{name}`" in text or f"`{name}:" in text, name
    assert all(status in text for status in REFUSALS)
