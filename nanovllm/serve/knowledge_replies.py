"""The bodies that /state/knowledge answers with, as types.

What it is: what the OpenAPI document says of them, and the way from an object there. What it knows nothing about:
engines, who may see what. Invariant: whose namespace an object lies in is said as `own` or `public` and never named:
it is derived from a key.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from nanovllm.state.objects import PUBLIC, Document, StateObject

Scope = Literal["own", "public"]


class PrefillReply(Struct, forbid_unknown_fields=True):
    """What became of a document's KV: computed, queued behind all other work, or left to the first question."""

    status: Literal["computed", "queued", "left"]
    reason: str
    cached_tokens: int  # found instead of computed


class KnowledgeReply(Struct, forbid_unknown_fields=True):
    """A document that was kept. `tokens`: from the prompt's start to the document's end; `pin`: its receipt."""

    state_id: str
    name: str
    version: str | None
    scope: Scope
    tokens: int
    durable: bool
    prefill: PrefillReply
    pin: dict[str, Any] | None


class DocumentReply(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A document; its text and path where one is looked at."""

    state_id: str
    name: str | None
    version: str | None
    scope: Scope
    tokens: int
    durable: bool
    created_ms: int
    expires_ms: int | None
    text: str | None = None
    system: str | None = None
    template: str | None = None


class DocumentsReply(Struct, forbid_unknown_fields=True):
    """A page; `next` is the `after` of the one behind it."""

    documents: list[DocumentReply]
    next: str | None


class DroppedReply(Struct, forbid_unknown_fields=True):
    """The receipt of each version that was removed."""

    dropped: list[dict[str, Any]]


def reply_of(obj: StateObject, content: Document | str | None = None) -> DocumentReply:
    """An object as its users see it; with `content`, its text, too."""
    document = Document(content) if isinstance(content, str) else content
    scope: Scope = "public" if obj.namespace == PUBLIC else "own"
    reply = DocumentReply(
        obj.state_id, obj.name, obj.version, scope, obj.num_tokens, obj.durable, obj.created_ms, obj.expires_ms
    )
    if document is not None:
        reply.text, reply.system, reply.template = document.text, document.system, document.template
    return reply
