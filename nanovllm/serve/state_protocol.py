"""The bodies that operators send to /state: one Struct per call, strict as those of clients.

What it is: types. What it knows nothing about: the engine, who may call. Invariants: a field that is not here
is refused by name; null means absent.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from nanovllm.serve.protocol import Label, TokenId

Kind = Literal["kv", "knowledge", "session", "meta"]
Seconds = Annotated[float, Meta(gt=0)]


class PutMetadata(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the caller says of an object; `ttl` in seconds."""

    kind: Kind | None = None
    name: Label | None = None
    version: Label | None = None
    namespace: Label | None = None
    ttl: Seconds | None = None
    durable: bool | None = None


class PutBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/objects: a text or messages, with or without token ids, or token ids alone."""

    text: str | None = None
    token_ids: list[TokenId] | None = None
    messages: list[dict[str, Any]] | None = None
    metadata: PutMetadata | None = None


class UpdateBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """PUT /state/objects/{id}: new content; with `generation`, only if the object is still at that one."""

    text: str | None = None
    token_ids: list[TokenId] | None = None
    messages: list[dict[str, Any]] | None = None
    generation: Annotated[int, Meta(ge=1, le=2**53)] | None = None


class PinBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/objects/{id}/pin: `ttl` in seconds, for ever without."""

    device: Label = "gpu"
    ttl: Seconds | None = None


class UnpinBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/objects/{id}/unpin: one tier, or all."""

    device: Label | None = None


class MigrateBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/objects/{id}/migrate."""

    tier: Label


class ForkBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/objects/{id}/fork."""

    metadata: PutMetadata | None = None


class EvictBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/evict: one object's worth where no `bytes` are given."""

    policy: Label | None = None
    bytes: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    kind: Kind | None = None
    tier: Label | None = None


class VerifyBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/verify."""

    tier: Label | None = None
    repair: bool = False


class KnowledgeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /state/knowledge: a document, and its path: what stands before it (`system`) and around it (`template`)."""

    text: Annotated[str, Meta(min_length=1)]
    name: Label
    version: Label | None = None
    system: str | None = None
    template: str | None = None
    scope: Literal["own", "public"] = "own"
    ttl: Seconds | None = None
    pin: PinBody | None = None
    wait: bool = False
