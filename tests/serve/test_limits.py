"""Every limit of a request, set lower than it is: what is within it is served, what is beyond it is a 4xx by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from nanovllm.serve.config import LIMIT_PREFIX, Limits
from tests.serve.servers import CHAT, COMPLETIONS, LiveServer
from tests.serve.surface import HI


def tools(count: int) -> dict[str, Any]:
    return {"messages": HI, "tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]}


def schema(value: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return {"messages": HI, "response_format": wanted}


def text(**more: Any) -> dict[str, Any]:
    return {"prompt": "x", **more}


FEW = {
    "body_bytes": 400, "header_bytes": 1024, "json_depth": 7, "messages": 2, "prompts": 2, "n": 2, "stop": 1,
    "stop_bytes": 3, "stop_ids": 1, "logit_bias": 1, "logprobs": 1, "schema_bytes": 40, "schema_depth": 2, "tools": 1,
    "knowledge": 1,
}  # fmt: skip
# limit -> (path, body within, body beyond, the field that is named, status)
Case = tuple[str, dict[str, Any], dict[str, Any], str | None, int]
CASES: dict[str, Case] = {
    "body_bytes": (COMPLETIONS, text(), text(user="x" * 400), None, 413),
    "json_depth": (COMPLETIONS, text(metadata={"a": [[[1]]]}), text(metadata={"a": [[[[[[1]]]]]]}), "metadata", 400),
    "messages": (CHAT, {"messages": HI * 2}, {"messages": HI * 3}, "messages", 400),
    "prompts": (COMPLETIONS, text(prompt=["a", "b"]), text(prompt=["a", "b", "c"]), "prompt", 400),
    "n": (COMPLETIONS, text(n=2), text(n=3), "n", 400),
    "stop": (COMPLETIONS, text(stop=["a"]), text(stop=["a", "b"]), "stop", 400),
    "stop_bytes": (COMPLETIONS, text(stop="abc"), text(stop=["ab\u00e9"]), "stop", 400),
    "stop_ids": (COMPLETIONS, text(stop_token_ids=[1]), text(stop_token_ids=[1, 2]), "stop_token_ids", 400),
    "logit_bias": (COMPLETIONS, text(logit_bias={"1": 1}), text(logit_bias={"1": 1, "2": 1}), "logit_bias", 400),
    "logprobs": (COMPLETIONS, text(logprobs=1), text(logprobs=2), "logprobs", 400),
    "schema_bytes": (
        CHAT,
        schema({"type": "null"}),
        schema({"type": "null", "description": "x" * 40}),
        "response_format.json_schema.schema",
        400,
    ),
    "schema_depth": (
        CHAT,
        schema({"enum": [1]}),
        schema({"not": {"not": {}}}),
        "response_format.json_schema.schema",
        400,
    ),
    "tools": (CHAT, tools(1), tools(2), "tools", 400),
    "knowledge": (CHAT, {"messages": HI, "knowledge": []}, {"messages": HI, "knowledge": ["a", "b"]}, "knowledge", 400),
}


@pytest.mark.parametrize("name", [f.name for f in fields(Limits)])
def test_a_limit_is_heeded(server: Callable[..., LiveServer], name: str) -> None:
    live = server(**{LIMIT_PREFIX + limit: value for limit, value in FEW.items()})
    if name == "header_bytes":
        assert live.get("/health", **{"X-A": "a" * 500}).status == 200
        assert live.get("/health", **{"X-A": "a" * 1000}).status == 431
        return
    path, within, beyond, param, status = CASES[name]
    served = live.ask("POST", path, {"max_tokens": 2, **within})
    assert served.status == 200, served.body
    refused = live.ask("POST", path, {"max_tokens": 2, **beyond})
    assert (refused.status, refused.json["error"]["param"]) == (status, param), refused.body
