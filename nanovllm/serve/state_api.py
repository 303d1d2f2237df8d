"""/state: the operator's calls on state, over HTTP.

What it is: one handler per call; docs/state.md has the table. What it knows nothing about: who may call
(the gate lets the admin in), how state works. Invariants: every call goes to the engine as a message and is
answered within the server's request timeout; an action is answered by its receipt; one that was refused, by
the error with the receipt beside it; pages and bodies are bounded.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.errors import DeadlineError, InvalidRequestError
from nanovllm.serve import state_protocol as protocol
from nanovllm.serve.body import read_body
from nanovllm.serve.reception import Body, decoded, parts_of
from nanovllm.state.report import (
    MAX_PAGE,
    accepted,
    content_of,
    explanation_facts,
    namespace_of,
    object_facts,
    page,
    position,
    receipt_facts,
    storable,
)

STATE_PREFIX = "/state/"
OBJECTS, OBJECT = "/state/objects", "/state/objects/{state_id}"
IMPORT_PATH, KNOWLEDGE_PATH = "/state/import", "/state/knowledge"
BINARY = "application/octet-stream"
PAGE = 50


async def list_objects(request: Request) -> Response:
    """One page of the objects, the oldest first."""
    asked = query_of(request, "namespace", "kind", "name", "after", "limit")
    limit, after = limit_of(asked.pop("limit", str(PAGE))), position(asked.pop("after", None))
    return json_of(page(await _call(request, "ls", **asked, after=after, limit=limit + 1), limit))


async def put(request: Request) -> Response:
    """Keep an object."""
    body = await _body(request, protocol.PutBody)
    obj = storable(body.text, body.token_ids, body.messages)
    return await _act(request, "put", obj=obj, metadata=_metadata(body.metadata))


async def get(request: Request) -> Response:
    """What is known of an object, and what was put, verified."""
    named = _named(request)
    found = await _call(request, "find", **named)
    content = await _call(request, "get", **named)
    return json_of({**object_facts(found), "content": content_of(content)})


async def update(request: Request) -> Response:
    """Replace what an object holds; of two at once one is refused, and with `generation` whoever has not read it."""
    body = await _body(request, protocol.UpdateBody)
    obj = storable(body.text, body.token_ids, body.messages)
    return await _act(request, "update", **_named(request), obj=obj, generation=body.generation, erase=True)


async def drop(request: Request) -> Response:
    """Out of every tier, and out of what prompts remember of documents."""
    receipt = accepted(await _call(request, "drop", **_named(request)))
    parts_of(request)[0].knowledge.forget(state_id=receipt["state_id"] or "")
    return json_of(receipt)


async def pin(request: Request) -> Response:
    """Keep its bytes in a tier."""
    body = await _body(request, protocol.PinBody)
    return await _act(request, "pin", **_named(request), device=body.device, ttl=body.ttl)


async def unpin(request: Request) -> Response:
    """Give the claim back. Nothing to give back is no refusal: the receipt says it."""
    body = await _body(request, protocol.UnpinBody)
    return await _tell(request, "unpin", **_named(request), device=body.device)


async def migrate(request: Request) -> Response:
    """Bring its bytes to a tier."""
    body = await _body(request, protocol.MigrateBody)
    return await _act(request, "migrate", **_named(request), tier=body.tier)


async def fork(request: Request) -> Response:
    """A second object that begins as the first."""
    body = await _body(request, protocol.ForkBody)
    named = _named(request)
    metadata = _metadata(body.metadata)
    if "namespace" not in metadata:  # it stays where the first one is
        metadata["namespace"] = (await _call(request, "find", **named)).namespace
    return await _act(request, "fork", **named, metadata=metadata)


async def explain(request: Request) -> Response:
    """An object's history of decisions."""
    return json_of(explanation_facts(await _call(request, "explain", **_named(request))))


async def evict(request: Request) -> Response:
    """Free room."""
    body = await _body(request, protocol.EvictBody)
    return await _act(request, "evict", policy=body.policy, bytes=body.bytes, kind=body.kind, tier=body.tier)


async def verify(request: Request) -> Response:
    """Read and check everything. Damage that was found is no refusal: the receipt says it."""
    body = await _body(request, protocol.VerifyBody)
    return await _tell(request, "verify", tier=body.tier, repair=body.repair)


async def tiers(request: Request) -> Response:
    """Bytes, hits and failures of each tier."""
    query_of(request)
    return json_of(await _call(request, "top"))


async def export(request: Request) -> Response:
    """The object and its KV as one bundle."""
    return Response(await _call(request, "export", **_named(request)), media_type=BINARY)


async def import_(request: Request) -> Response:
    """Take a bundle in, whole or not at all, under a new id."""
    services, _ = parts_of(request)
    metadata = query_of(request, "name", "version", "namespace")
    return await _act(request, "import_", bundle=await read_body(request, services), metadata=metadata)


ROUTES = (
    Route(OBJECTS, list_objects, methods=["GET"]),
    Route(OBJECTS, put, methods=["POST"]),
    Route(OBJECT, get, methods=["GET"]),
    Route(OBJECT, update, methods=["PUT"]),
    Route(OBJECT, drop, methods=["DELETE"]),
    Route(f"{OBJECT}/explain", explain, methods=["GET"]),
    Route(f"{OBJECT}/export", export, methods=["GET"]),
    Route(f"{OBJECT}/pin", pin, methods=["POST"]),
    Route(f"{OBJECT}/unpin", unpin, methods=["POST"]),
    Route(f"{OBJECT}/migrate", migrate, methods=["POST"]),
    Route(f"{OBJECT}/fork", fork, methods=["POST"]),
    Route("/state/evict", evict, methods=["POST"]),
    Route("/state/verify", verify, methods=["POST"]),
    Route("/state/tiers", tiers, methods=["GET"]),
    Route(IMPORT_PATH, import_, methods=["POST"]),
)


async def _call(request: Request, verb: str, **arguments: Any) -> Any:
    """The store's own answer or error. Raises DeadlineError where the engine takes too long."""
    services, _ = parts_of(request)
    limit_s = services.config.request_timeout
    try:
        async with asyncio.timeout(limit_s):
            return await services.engine.call_state(verb, **arguments)
    except TimeoutError:
        raise DeadlineError(f"The engine did not answer within {limit_s:g} s.") from None


async def _tell(request: Request, verb: str, **arguments: Any) -> Response:
    """An action, answered by its receipt."""
    return json_of(receipt_facts(await _call(request, verb, **arguments)))


async def _act(request: Request, verb: str, **arguments: Any) -> Response:
    """As `_tell`; raises StateRefusedError where the receipt is a refusal."""
    return json_of(accepted(await _call(request, verb, **arguments)))


async def _body(request: Request, kind: type[Body]) -> Body:
    services, _ = parts_of(request)
    return await decoded(request, services, kind)


def _named(request: Request) -> dict[str, Any]:
    """The object that the path names, by id, name or name@version, and where it is looked up."""
    state_id = request.path_params["state_id"]
    return {"state_id": state_id, "namespace": namespace_of(state_id, query_of(request, "namespace").get("namespace"))}


def query_of(request: Request, *known: str) -> dict[str, str]:
    """The query's parameters. Raises InvalidRequestError on one that is not known here, or there twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known or name in found:
            what = "is given twice" if name in found else "is no parameter here"
            raise InvalidRequestError(f"{name[:60]!r} {what}.", param=name[:60], hint=", ".join(known) or None)
        found[name] = value
    return found


def limit_of(text: str) -> int:
    """How long a page is. Raises InvalidRequestError."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_PAGE:
        raise InvalidRequestError(f"limit must be from 1 to {MAX_PAGE}.", param="limit")
    return int(text)


def _metadata(given: protocol.PutMetadata | None) -> dict[str, Any]:
    plain: dict[str, Any] = {} if given is None else msgspec.to_builtins(given)
    return plain


def json_of(data: Any) -> Response:
    """An answer of JSON."""
    return Response(msgspec.json.encode(data), media_type="application/json")
