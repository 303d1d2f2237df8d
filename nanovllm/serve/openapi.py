"""GET /openapi.json: the surface, described from the types that decode it.

What it is: one document, built when it is first asked for. What it knows nothing about:
how requests are served. Invariant: what it says of bodies is what the decoder enforces,
because both read the same Structs.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm import __version__
from nanovllm.serve import knowledge_paths, protocol, replies, state_paths, turn_paths
from nanovllm.serve.response_protocol import ResponseRequest
from nanovllm.serve.state_api import BINARY
from nanovllm.serve.state_replies import StateErrorReply

REFUSALS = {
    "400": "a field is malformed, unknown or cannot be honoured; `param` names it",
    "401": "no API key, or an unknown one",
    "403": "this caller may not do that",
    "404": "no such model or path",
    "405": "this path has no such method",
    "408": "the body did not arrive in time",
    "409": "another turn of this conversation is under way, or the name is taken",
    "413": "the body is too large",
    "415": "the body is not plain JSON",
    "429": "this key has as much in flight as it may; `Retry-After` says when to come again",
    "500": "the server failed; the request id finds it in the log",
    "503": "overloaded, loading, draining or failed; `Retry-After` says when to come again",
    "504": "the request took longer than it may",
    "507": "there is no room to keep it; `store: false` asks for none",
}
_SMALL = ("401", "403", "500", "503")
_REF = "#/components/schemas/"
# path, method, request, reply, chunk of a stream, summary
_ENDPOINTS: tuple[tuple[str, str, Any, Any, Any, str], ...] = (
    ("/v1/models", "get", None, replies.ModelsReply, None, "The names of the model"),
    ("/v1/models/{name}", "get", None, replies.ModelReply, None, "One name of the model"),
    ("/v1/chat/completions", "post", protocol.ChatRequest, replies.ChatReply, replies.ChatChunk, "Answer a chat"),
    ("/v1/completions", "post", protocol.CompletionRequest, replies.TextReply, replies.TextReply, "Continue a text"),
    ("/tokenize", "post", protocol.TokenizeRequest, replies.TokenizeReply, None, "Text to token ids"),
    ("/detokenize", "post", protocol.DetokenizeRequest, replies.DetokenizeReply, None, "Token ids to text"),
    ("/health", "get", None, replies.StatusReply, None, "Whether the engine lives"),
    ("/health/ready", "get", None, replies.StatusReply, None, "Whether a request would be taken now"),
    ("/ping", "get", None, replies.StatusReply, None, "The same as /health"),
    ("/version", "get", None, replies.VersionReply, None, "The version of the package"),
    *turn_paths.ENDPOINTS,
    *knowledge_paths.ENDPOINTS,
    *state_paths.ENDPOINTS,
)
_QUERIES = {**turn_paths.QUERIES, **knowledge_paths.QUERIES, **state_paths.QUERIES}
_CALLS = {**turn_paths.CALLS, **knowledge_paths.CALLS, **state_paths.CALLS}


async def openapi(request: Request) -> Response:
    """The document."""
    return Response(_rendered(), media_type="application/json")


@lru_cache(maxsize=1)
def _rendered() -> bytes:
    return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """The document as data."""
    kinds = [kind for _, _, *triple, _ in _ENDPOINTS for kind in triple if kind not in (None, bytes)]
    kinds += [replies.ErrorReply, StateErrorReply]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF + "{name}")
    for kind in (protocol.ChatRequest, protocol.CompletionRequest, ResponseRequest):
        _mark(components[kind.__name__], kind)
    paths: dict[str, Any] = {}
    for path, method, asked, answered, chunk, summary in _ENDPOINTS:
        paths.setdefault(path, {})[method] = _operation(path, method, asked, answered, chunk, summary)
    return {
        "openapi": "3.1.0",
        "info": {"title": "nano-vllm-hust", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(path: str, method: str, asked: Any, answered: Any, chunk: Any, summary: str) -> dict[str, Any]:
    content = _content(answered)
    if chunk is not None:
        content["text/event-stream"] = {"schema": _ref(chunk) | {"description": "data: one such object a line"}}
    responses: dict[str, Any] = {"200": {"description": summary, "content": content}}
    queries = _QUERIES.get((path, method), ())
    few = (*_SMALL, *(["404"] if "{" in path else []), *(["400"] if queries else []), *_CALLS.get(path, ()))
    failed = StateErrorReply if path in state_paths.PATHS else replies.ErrorReply
    for status in REFUSALS if asked is not None else few:
        responses[status] = _refusal(status, answered if answered is replies.StatusReply else failed)
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if asked is not None:
        operation["requestBody"] = {"required": True, "content": _content(asked)}
    named = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    if named or queries:
        operation["parameters"] = [*named, *queries]
    return operation


def _refusal(status: str, kind: Any) -> dict[str, Any]:
    schema = _ref(kind)
    if kind is replies.StatusReply:  # a health path says its state; the gate, what it refuses
        schema = {"anyOf": [schema, _ref(replies.ErrorReply)]}
    return {"description": REFUSALS[status], "content": {"application/json": {"schema": schema}}}


def _content(kind: Any) -> dict[str, Any]:
    if kind is bytes:
        return {BINARY: {"schema": {"type": "string", "format": "binary"}}}
    return {"application/json": {"schema": _ref(kind)}}


def _ref(kind: Any) -> dict[str, Any]:
    return {"$ref": _REF + kind.__name__}


def _mark(component: dict[str, Any], kind: type[msgspec.Struct]) -> None:
    """Say of each field whether it is a hint without effect, or refused."""
    for name in protocol.HINTS:
        component["properties"][name]["description"] = "accepted, without effect"
    for name, why in protocol.refused_fields(kind).items():
        component["properties"][name]["description"] = f"not supported: {why}"
