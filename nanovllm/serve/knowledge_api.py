"""/state/knowledge: documents that users upload, look at and remove.

What it is: one handler per call; docs/knowledge.md tells users of it. What it knows nothing about: how prompts
carry documents. Invariants: a text is kept as promised before anything is computed; a document that no prompt
could carry is refused and not kept; a tenant writes into its own namespace alone, the operator into the public
one as well; pins, which take room from everybody, are the operator's.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.core.segments import Segment
from nanovllm.engine.device_state_tier import store_namespace
from nanovllm.engine.knowledge_prompt import check_template, path_of, spans_of
from nanovllm.errors import AccessError, InvalidRequestError, NanoVLLMError
from nanovllm.serve.context import Services, Tenant
from nanovllm.serve.knowledge import KIND, Knowledge
from nanovllm.serve.knowledge_prefill import Job
from nanovllm.serve.knowledge_replies import DocumentsReply, DroppedReply, KnowledgeReply, PrefillReply, reply_of
from nanovllm.serve.reception import BYTES_PER_S, RENDER_S, check_size, decoded, parts_of, within
from nanovllm.serve.state_api import KNOWLEDGE_PATH, PAGE, json_of, limit_of, query_of
from nanovllm.serve.state_protocol import KnowledgeBody, PinBody
from nanovllm.serve.turn_store import check_removed
from nanovllm.state.objects import PUBLIC, Document, StateId, check_name
from nanovllm.state.report import page, position, receipt_facts

NOT_SHARED = "each key computes its own KV at its first question: without --share-prefix prefixes are not shared"


async def put(request: Request) -> Response:
    """Keep a document; have its KV computed, and wait for that where asked."""
    services, ticket = parts_of(request)
    body = await decoded(request, services, KnowledgeBody)
    namespace = _namespace(services, ticket.tenant, body.scope, body.pin is not None)
    document, path = await _read(services, body)
    metadata = {"kind": KIND, "name": body.name, "version": body.version, "namespace": namespace, "ttl": body.ttl}
    knowledge = services.knowledge
    state_id: StateId = await knowledge.call("put", obj=document, metadata=metadata)
    knowledge.forget(namespace=namespace, label=_label(body))
    kept = state_id.receipt is not None and state_id.receipt.reason == "durable"
    pinned = None if body.pin is None else await _pinned(knowledge, state_id, namespace, body.pin)
    ticket.started()  # what waits from here on waits behind the queue, not in it
    prefill = await _prefill(services, namespace, document, path, body)
    tokens = len(document.token_ids)
    return json_of(KnowledgeReply(str(state_id), body.name, body.version, body.scope, tokens, kept, prefill, pinned))


async def list_documents(request: Request) -> Response:
    """One page of the tenant's own documents and the public ones, the oldest first, without their texts."""
    services, ticket = parts_of(request)
    asked = query_of(request, "name", "after", "limit")
    limit, after = limit_of(asked.get("limit", str(PAGE))), position(asked.get("after"))
    own = store_namespace(ticket.tenant.owner)
    found = await services.knowledge.call(
        "ls", namespace=own, kind=KIND, name=asked.get("name"), after=after, limit=limit + 1
    )
    return json_of(DocumentsReply([reply_of(obj) for obj in found[:limit]], page(found, limit)["next"]))


async def get(request: Request) -> Response:
    """A document's facts and its text, verified."""
    services, ticket = parts_of(request)
    query_of(request)
    found = await services.knowledge.find(ticket.tenant, request.path_params["name"])
    return json_of(reply_of(found, await services.knowledge.call("get", state_id=found.state_id)))


async def drop(request: Request) -> Response:
    """Remove a version, or, where none is named, all of them; with the KV that only they owned."""
    services, ticket = parts_of(request)
    asked = query_of(request, "scope")
    namespace = _namespace(services, ticket.tenant, asked.get("scope", "own"), False)
    knowledge = services.knowledge
    versions = await knowledge.called(namespace, request.path_params["name"])
    for obj in versions:
        await knowledge.prefills.cancel((namespace, obj.label))
        knowledge.forget(state_id=obj.state_id)
    receipts = await asyncio.gather(*(knowledge.call("drop", state_id=obj.state_id) for obj in versions))
    for obj in versions:  # a prompt may have looked at it meanwhile
        knowledge.forget(state_id=obj.state_id)
    check_removed(*receipts)
    return json_of(DroppedReply([receipt_facts(receipt) for receipt in receipts]))


ROUTES = (
    Route(KNOWLEDGE_PATH, put, methods=["POST"]),
    Route(KNOWLEDGE_PATH, list_documents, methods=["GET"]),
    Route(KNOWLEDGE_PATH + "/{name:path}", get, methods=["GET"]),
    Route(KNOWLEDGE_PATH + "/{name:path}", drop, methods=["DELETE"]),
)


def _namespace(services: Services, tenant: Tenant, scope: str, pins: bool) -> str:
    """Where the caller may write. Raises InvalidRequestError, AccessError."""
    if scope not in ("own", "public"):
        raise InvalidRequestError(f"scope must be own or public, not {scope!r:.60}.", param="scope")
    is_operator = tenant.is_admin or not services.tenants.has_keys
    if not is_operator and (scope != "own" or pins):
        raise AccessError("Public documents and pins need the admin key.", param="pin" if pins else "scope")
    return PUBLIC if scope == "public" else store_namespace(tenant.owner)


async def _read(services: Services, body: KnowledgeBody) -> tuple[Document, list[Segment]]:
    """The document with the ids of its path, and the path. Raises InvalidRequestError, ContextLengthError."""
    check_name(body.name, "name")
    if body.template is not None:
        check_template(body.template)
    document = Document(body.text, (), body.system or "", body.template or "")
    size = len(document.text) + len(document.system) + len(document.template)
    check_size(size, services, "text")
    engine = services.engine
    work = partial(path_of, engine.tokenizer, document, _label(body), engine.info.max_model_len)
    return await within(services.pool, work, RENDER_S + size / BYTES_PER_S, "text")


async def _pinned(knowledge: Knowledge, state_id: StateId, namespace: str, pin: PinBody) -> dict[str, Any]:
    """The pin's receipt. The document is kept by now: a pin that cannot be is told, not raised."""
    if knowledge.kv_namespace_of(namespace) is None:
        return {"action": "pin", "ok": False, "reason": NOT_SHARED}
    try:
        return receipt_facts(await knowledge.call("pin", state_id=state_id, device=pin.device, ttl=pin.ttl))
    except NanoVLLMError as error:
        return {"action": "pin", "ok": False, "reason": error.message}


async def _prefill(
    services: Services, namespace: str, document: Document, path: list[Segment], body: KnowledgeBody
) -> PrefillReply:
    """Have the path's KV computed where prompts will look for it."""
    knowledge = services.knowledge
    where = knowledge.kv_namespace_of(namespace)
    if where is None:
        return PrefillReply("left", NOT_SHARED, 0)
    key = namespace, _label(body)
    job = await knowledge.prefills.start(key, [*document.token_ids], where, spans_of(path))
    if job is None:
        return PrefillReply("left", "too much waits already: the first question computes it", 0)
    if not body.wait:
        return PrefillReply("queued", "when nothing else is to be computed", 0)
    await asyncio.wait([job], timeout=services.config.request_timeout)
    return _outcome(job)


def _outcome(job: Job) -> PrefillReply:
    if not job.done():
        return PrefillReply("queued", "it takes longer than a request may", 0)
    error = None if job.cancelled() else job.exception()
    done = None if job.cancelled() or error is not None else job.result()
    if done is None:
        why = error.message if isinstance(error, NanoVLLMError) else "another upload of this name came"
        return PrefillReply("left", f"it was not computed: {why}", 0)
    return PrefillReply("computed", "its KV lies where prompts look for it", done.cached_tokens)


def _label(body: KnowledgeBody) -> str:
    return body.name if body.version is None else f"{body.name}@{body.version}"
