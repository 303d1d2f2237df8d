"""Items: what a stored conversation is made of, and the chat messages that a template reads.

What it is: checked input into items as they are stored and listed, and items into messages. What it knows
nothing about: where items lie, HTTP. Invariants: every stored item has a random id of our own; whatever is stored
can be rendered again; items in, messages out, in the same order, with an assistant's calls beside its text.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nanovllm.errors import InvalidRequestError
from nanovllm.serve.config import Limits
from nanovllm.serve.protocol import (
    AssistantMessage,
    DeveloperMessage,
    FunctionCall,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from nanovllm.serve.response_protocol import Item, ItemContent, RefusalPart
from nanovllm.serve.response_replies import ItemReply
from nanovllm.state.objects import Session

Stored = dict[str, Any]
RESPONSE, CONVERSATION = "response", "conversation"  # what a stored turn says it is
RESERVED = ("resp_", "conv_")  # what ids begin with, and names do not
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
_SPEAKERS: dict[str, Any] = {"user": UserMessage, "system": SystemMessage, "developer": DeveloperMessage}


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{_PREFIXES.get(kind, kind)}_{secrets.token_hex(24)}"


def check_count(count: int, limits: Limits, param: str) -> None:
    """Raise InvalidRequestError for more items than a conversation may have; asked before each is looked at."""
    if count > limits.messages:
        raise InvalidRequestError(f"A conversation has at most {limits.messages} items.", param=param)


def stored_items(given: str | Sequence[Item], param: str = "input") -> list[Stored]:
    """Input as it is stored. Raises InvalidRequestError naming the item's field."""
    items = [Item(role="user", content=given)] if isinstance(given, str) else given
    return [_stored(item, f"{param}[{index}]") for index, item in enumerate(items)]


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Stored items as a chat's messages; calls join the assistant's text before them."""
    messages: list[Message] = []
    for item in items:
        if item["type"] == "function_call":
            _add_call(messages, item)
        elif item["type"] == "function_call_output":
            messages.append(ToolMessage(item["output"], item["call_id"]))
        elif item["role"] == "assistant":
            messages.append(AssistantMessage(content=text_of(item)))
        else:
            messages.append(_SPEAKERS[item["role"]](text_of(item)))
    return messages


class Facts(msgspec.Struct):
    """What stands beside the items of a stored turn."""

    object: str
    response: str = ""
    num_input: int = 0
    asked: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    marks: list[tuple[int, int]] = []
    is_cut: bool = False


def is_turn(session: Session, kind: str) -> bool:
    """Whether it is a response or a conversation as it was kept here; what is imported may be anything."""
    try:
        msgspec.convert([*session.messages], list[ItemReply])
        return msgspec.convert(dict(session.facts), Facts).object == kind
    except msgspec.ValidationError:
        return False


def message_item(role: str, text: str, status: str = "completed") -> Stored:
    """A message of one text."""
    return {"id": new_id("message"), "type": "message", "role": role, "status": status, "content": [_part(role, text)]}


def text_of(item: Mapping[str, Any]) -> str:
    """What a stored message says; its parts stand on lines of their own."""
    return "\n".join(part["text"] for part in item["content"])


def _stored(item: Item, param: str) -> Stored:
    kind = item.type or "message"
    for field in _NEEDED[kind]:
        if getattr(item, field) is None:
            raise InvalidRequestError(f"{param}.{field} is missing.", param=f"{param}.{field}")
    for field in {name for names in _NEEDED.values() for name in names} - {*_NEEDED[kind]}:
        if getattr(item, field) is not None:
            raise InvalidRequestError(f"{param}: a {kind} has no {field}.", param=f"{param}.{field}")
    status = {"id": new_id(kind), "type": kind, "status": item.status or "completed"}
    if kind == "message":
        role = str(item.role)
        return {**status, "role": role, "content": [_part(role, text) for text in _texts(item.content or "")]}
    if kind == "function_call":
        _check_arguments(item.arguments, f"{param}.arguments")
        return {**status, "call_id": item.call_id, "name": item.name, "arguments": item.arguments}
    return {**status, "call_id": item.call_id, "output": "\n".join(_texts(item.output or ""))}


def _check_arguments(given: str | None, param: str) -> None:
    """Templates read them as an object."""
    try:
        msgspec.json.decode(given or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequestError(f"{param} is not a JSON object.", param=param, hint='Send "{}" for none.') from None


def _part(role: str, text: str) -> Stored:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}


def _texts(content: ItemContent) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part.refusal if isinstance(part, RefusalPart) else part.text for part in content]


def _add_call(messages: list[Message], item: Mapping[str, Any]) -> None:
    call = ToolCall(id=item["call_id"], function=FunctionCall(item["name"], item["arguments"]))
    last = messages[-1] if messages else None
    if isinstance(last, AssistantMessage):
        last.tool_calls = [*(last.tool_calls or []), call]
    else:
        messages.append(AssistantMessage(tool_calls=[call]))
