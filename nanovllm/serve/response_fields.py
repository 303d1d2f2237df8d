"""A response's fields as a chat's, and as the response object shows them.

What it is: the dictionary between the two surfaces, both ways: fields there, refusals back. What it knows nothing
about: what the fields do (chat_order.py). Invariants: a field that a chat refuses is refused here under this
surface's name for it; the object shows what was used, defaults included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from nanovllm.errors import NanoVLLMError
from nanovllm.serve.answer import Prompt
from nanovllm.serve.chat_order import Asked
from nanovllm.serve.context import Services
from nanovllm.serve.protocol import (
    FunctionName,
    FunctionTool,
    JsonSchema,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from nanovllm.serve.response_protocol import NamedChoice, ResponseFunction, ResponseRequest, SchemaFormat

_SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "priority",
    "chat_template_kwargs",
    "parallel_tool_calls",
    "stream",
)
_NAMES = (  # a chat's name for a field, and ours
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^max_(completion_)?tokens$"), "max_output_tokens"),
    (re.compile(r"^response_format\.json_schema\b"), "text.format"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
)


def chat_fields(body: ResponseRequest) -> dict[str, Any]:
    """The fields of a ChatRequest, but for its messages."""
    fields = {name: getattr(body, name) for name in _SAME}
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["reasoning_effort"] = None if body.reasoning is None else body.reasoning.effort
    fields["response_format"] = _format(body)
    fields["tools"] = None if body.tools is None else [_tool(tool) for tool in body.tools]
    choice = body.tool_choice
    named = isinstance(choice, NamedChoice)
    fields["tool_choice"] = NamedToolChoice("function", FunctionName(choice.name)) if named else choice  # type: ignore[union-attr]
    return fields


def echo_of(body: ResponseRequest, asked: Asked, conversation_id: str | None) -> dict[str, Any]:
    """What the response object says of its request."""
    effort = None if body.reasoning is None else body.reasoning.effort
    return {
        "model": asked.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "conversation": None if conversation_id is None else {"id": conversation_id},
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": asked.params.temperature,
        "text": {"format": _shown_format(body), "verbosity": "medium"},
        "tool_choice": msgspec.to_builtins(body.tool_choice) or ("auto" if body.tools else "none"),
        "tools": [_shown_tool(tool) for tool in body.tools or []],
        "top_logprobs": 0,
        "top_p": asked.params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def asked_facts(body: ResponseRequest, asked: Asked, prompt: Prompt, services: Services) -> dict[str, Any]:
    """What the next turn compares itself with, to say why its prompt differs."""
    offered = asked.use.functions if asked.use.is_offered else ()
    info = services.engine.info
    return {
        "model": f"{info.model} {info.dtype} {info.vocab_size}",
        "tools": msgspec.json.encode(offered).decode() if offered else None,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "instructions": body.instructions,
        "chat_template_kwargs": body.chat_template_kwargs,
        "knowledge": [*prompt.documents] or None,
    }


@contextmanager
def renamed() -> Iterator[None]:
    """Refusals of a chat's fields, under the names that the client used."""
    try:
        yield
    except NanoVLLMError as error:
        raise in_our_names(error) from None


def in_our_names(error: NanoVLLMError) -> NanoVLLMError:
    """The same error; its parameter, and its message where that names it, as this surface calls it."""
    theirs, own = error.param or "", our_name(error.param or "")
    if own != theirs:
        error.param = own
        error.message = error.message.replace(theirs, own)
        error.args = (error.args[0].replace(theirs, own), *error.args[1:])
    return error


def our_name(theirs: str) -> str:
    """What a chat's field is called here."""
    for pattern, ours in _NAMES:
        own = pattern.sub(ours, theirs)
        if own != theirs:
            return own
    return theirs


def _format(body: ResponseRequest) -> ResponseFormat | None:
    wanted = None if body.text is None else body.text.format
    if not isinstance(wanted, SchemaFormat):
        return wanted
    return JsonSchemaFormat(JsonSchema(name=wanted.name, schema=wanted.schema, strict=wanted.strict))


def _tool(tool: ResponseFunction) -> Tool:
    return Tool("function", FunctionTool(tool.name, tool.description, tool.parameters, tool.strict))


def _shown_format(body: ResponseRequest) -> dict[str, Any]:
    wanted = None if body.text is None else body.text.format
    plain: dict[str, Any] = {"type": "text"} if wanted is None else msgspec.to_builtins(wanted)
    return {name: value for name, value in plain.items() if value is not None}


def _shown_tool(tool: ResponseFunction) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(tool)
    return plain
