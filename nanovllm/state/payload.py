"""Payloads: what a caller put, as bytes, and back.

What it is: the codec of texts, token ids, messages, Documents and Sessions. What it knows nothing about:
where the bytes lie. Invariants: what comes back equals what was put; an object of another type is a
TypeError, one too large an InvalidRequestError that names the limit; decoding runs no code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from nanovllm.errors import InvalidRequestError, shown
from nanovllm.state.objects import Document, Session, Storable, check_tokens

MAX_DEPTH = 32


class Payload(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The forms that bytes can have."""

    form: str
    text: str = ""
    token_ids: list[int] = []
    messages: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}


def payload_of(obj: Storable) -> Payload:
    """What `obj` holds. Raises TypeError on a type that is no state, InvalidRequestError on a bad value."""
    if isinstance(obj, str):
        return Payload(form="text", text=_text(obj))
    if isinstance(obj, Document):
        path = {name: _text(part) for name in ("system", "template") if (part := getattr(obj, name))}
        ids = list(check_tokens(obj.token_ids))
        return Payload(form="document", text=_text(obj.text), token_ids=ids, facts=path)
    if isinstance(obj, Session):
        tokens = list(check_tokens(obj.token_ids))
        return Payload(form="session", messages=_messages(obj.messages), token_ids=tokens, facts=_facts(obj.facts))
    if isinstance(obj, list | tuple) and obj and all(isinstance(part, Mapping) for part in obj):
        return Payload(form="messages", messages=_messages(obj))
    if isinstance(obj, list | tuple) and obj and all(isinstance(part, int) for part in obj):
        return Payload(form="tokens", token_ids=list(check_tokens(obj)))
    raise TypeError(
        f"put takes text, token ids, messages, a Document or a Session, not {type(obj).__name__} {shown(obj)}."
    )


def object_of(payload: Payload) -> Storable:
    """What was put."""
    if payload.form == "text":
        return payload.text
    if payload.form == "document":
        path = {name: str(payload.facts.get(name, "")) for name in ("system", "template")}
        return Document(payload.text, payload.token_ids, **path)
    if payload.form == "session":
        return Session(payload.messages, payload.token_ids, payload.facts)
    return payload.messages if payload.form == "messages" else payload.token_ids


def encode(payload: Payload, limit: int) -> bytes:
    """Its bytes. Raises InvalidRequestError above `limit`, or where a message holds what JSON has no word for."""
    try:
        data = msgspec.msgpack.encode(payload)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequestError(f"The object cannot be stored: {error}.", param="obj") from error
    if len(data) > limit:
        raise InvalidRequestError(
            f"The object has {len(data):,} bytes; at most {limit:,} are kept.", param="obj", hint="Split it."
        )
    return data


def decode(data: bytes) -> Payload:
    """Verified bytes, read again. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(data, type=Payload)


def default_kind(payload: Payload) -> str:
    """The kind of an object whose caller names none."""
    return {"tokens": "kv", "messages": "session", "session": "session"}.get(payload.form, "knowledge")


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"A text is a str, not {type(text).__name__}.")
    if not text:
        raise InvalidRequestError("The text is empty: there is nothing to keep.", param="obj")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("The text holds lone surrogates, which UTF-8 cannot write.", param="obj") from error
    return str(text)


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError("Messages are a list of mappings.")
    return [_plain(dict(message), MAX_DEPTH) for message in messages]


def _facts(facts: object) -> dict[str, Any]:
    if not isinstance(facts, Mapping):
        raise TypeError("Facts are a mapping.")
    plain: dict[str, Any] = _plain(dict(facts), MAX_DEPTH)
    return plain


def _plain(value: Any, depth: int) -> Any:
    """Only what JSON knows, so that what comes back equals what was put."""
    if depth == 0:
        raise InvalidRequestError(f"A message is nested deeper than {MAX_DEPTH}.", param="obj")
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part, depth - 1) for part in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_text(key): _plain(part, depth - 1) for key, part in value.items()}
    raise InvalidRequestError(f"A message holds {shown(value)}, which JSON has no word for.", param="obj")
