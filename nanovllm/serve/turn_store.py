"""Stored turns: responses and conversations as session objects of the engine's state store.

What it is: find, keep, replace and drop, in one tenant's namespace, with the tenant's quota. What it knows nothing
about: HTTP, prompts, what a session's facts mean. Invariants: an object is looked up by (tenant, id) and another
tenant's is not there; what `keep` has returned is durable where there is a folder; a conversation is written by one
turn at a time: whoever comes second is refused, here at once or by its generation.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.device_state_tier import store_namespace
from nanovllm.errors import (
    DeadlineError,
    InvalidRequestError,
    NanoVLLMError,
    SessionQuotaError,
    StateConflictError,
    StateNotFoundError,
    StateRefusedError,
    TierError,
    TierFullError,
)
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.context import Tenant
from nanovllm.serve.items import CONVERSATION, RESPONSE, is_turn
from nanovllm.state.objects import Session, StateObject
from nanovllm.state.receipts import Receipt

logger = logging.getLogger("nanovllm.serve")
KIND = "session"
CONVERSATION_PREFIX = "conv_"
_FORMS = {RESPONSE: re.compile(r"resp_[0-9a-f]{48}"), CONVERSATION: re.compile(r"conv_([0-9a-f]{32})")}
FEWER = "Delete responses or conversations, or send store: false."
DELETE_IT = "Ask again, or DELETE it: what is left of it goes, and so does its name."
REST = "Nobody finds it any more. The rest is tried again while the server runs; another DELETE tries it now."
REST_OF_ITEM = (
    "The conversation is without it. The rest is tried again while the server runs; "
    "DELETE of the conversation tries it now."
)
STATE_S = 60.0  # for one call on the state; a tier's own deadlines are seconds


@dataclass(frozen=True)
class Kept:
    """A stored turn: which object, at which generation, and what it holds."""

    obj: StateObject
    session: Session

    @property
    def created(self) -> int:
        """Unix seconds."""
        return self.obj.created_ms // 1000

    @property
    def conversation_id(self) -> str:
        """Its id, where it is a conversation."""
        return CONVERSATION_PREFIX + self.obj.state_id


@dataclass
class TurnStore:
    """The stored turns of one server."""

    engine: AsyncEngine
    config: ServerConfig
    _busy: set[tuple[str, str]] = field(default_factory=set)

    async def find(self, tenant: Tenant, kind: str, given: str, param: str) -> Kept:
        """A response or conversation by its id, and what it holds. Raises StateNotFoundError, naming the field."""
        # first the object, then what it holds: a change in between makes the generation too old, never too new
        obj = await self.look_up(tenant, kind, given, param)
        try:
            session = await self._call("get", state_id=obj.state_id, namespace=store_namespace(tenant.owner))
        except StateNotFoundError:
            await self.look_up(tenant, kind, given, param)
            raise _unreadable(kind, given, param) from None
        if not isinstance(session, Session) or not is_turn(session, kind):
            raise _missing(kind, given, param)
        return Kept(obj, session)

    async def look_up(self, tenant: Tenant, kind: str, given: str, param: str) -> StateObject:
        """The same without what it holds, which may be damaged: enough to delete it."""
        try:
            obj: StateObject = await self._call("find", **_named(tenant, kind, given, param))
        except StateNotFoundError:
            raise _missing(kind, given, param) from None
        is_response = _FORMS[RESPONSE].fullmatch(obj.name or "") is not None
        if obj.is_hint or is_response != (kind == RESPONSE):
            raise _missing(kind, given, param)
        return obj

    async def named(self, tenant: Tenant, name: str) -> list[Kept]:
        """The tenant's conversation of that name, if there is one. Raises StateNotFoundError where it is damaged."""
        found = await self._call("ls", namespace=store_namespace(tenant.owner), kind=KIND, name=name, limit=1)
        try:
            return [await self.find(tenant, CONVERSATION, CONVERSATION_PREFIX + obj.state_id, "name") for obj in found]
        except StateNotFoundError as error:
            if error.hint == DELETE_IT:
                raise
        return []

    async def check_room(self, tenant: Tenant, *, more_objects: int = 1, more_bytes: int = 0) -> None:
        """Raise SessionQuotaError where the tenant keeps as much as it may, or so much more would find no room."""
        held = await self._call("holdings", namespace=store_namespace(tenant.owner), kind=KIND)
        limits = {
            "objects": self.config.max_tenant_sessions - more_objects,
            "bytes": self.config.max_tenant_session_bytes - 1,
        }
        for what, most in limits.items():
            if held[what] > most:
                raise SessionQuotaError(
                    f"This key keeps {held[what]:,} {what} of stored turns: it may have no more.",
                    param="store",
                    hint=FEWER,
                )
        if held["objects_left"] < more_objects or held["bytes_left"] < more_bytes:
            raise SessionQuotaError(
                f"There is room for {held['bytes_left']:,} more bytes of this key's turns; this one may take "
                f"{more_bytes:,}.",
                param="store",
                hint=FEWER,
            )

    async def keep(
        self, tenant: Tenant, session: Session, name: str | None = None, kv_namespace: str | None = None
    ) -> str:
        """Store it; its state id. `kv_namespace`: where its tokens were computed.

        Raises StateRefusedError, StateConflictError (the name is taken).
        """
        where = None if kv_namespace is None else store_namespace(kv_namespace)
        metadata = {"kind": KIND, "name": name, "namespace": store_namespace(tenant.owner), "kv_namespace": where}
        try:
            state_id = await self._call("put", obj=session, metadata=metadata | {"ttl": self.config.session_ttl})
        except (StateRefusedError, InvalidRequestError) as error:
            raise _in_our_words(error) from None
        return str(state_id)

    async def replace(
        self, tenant: Tenant, kept: Kept, session: Session, kv_namespace: str | None = None, *, erase: bool = False
    ) -> None:
        """Its next generation; `kv_namespace` as for `keep`, where it was before if none is named.

        Raises StateConflictError where it has one already, StateNotFoundError; with `erase`, TierError where a tier
        still has something of what only the last generation held.
        """
        where: dict[str, Any] = {"state_id": kept.obj.state_id, "namespace": store_namespace(tenant.owner)}
        if kv_namespace is not None:
            where["kv_namespace"] = store_namespace(kv_namespace)
        try:
            receipt = await self._call("update", obj=session, generation=kept.obj.generation, erase=erase, **where)
        except StateConflictError:
            raise _conflict() from None
        except StateNotFoundError:
            raise StateNotFoundError(
                "The conversation was deleted meanwhile, or has expired.",
                param="conversation",
                hint="Begin another one.",
            ) from None
        except (StateRefusedError, InvalidRequestError) as error:
            raise _in_our_words(error) from None
        check_removed(receipt, hint=REST_OF_ITEM)

    async def put_back(self, tenant: Tenant, kept: Kept) -> bool:
        """What a conversation held before its last `replace`, as one more generation; whether it could be written."""
        later = msgspec.structs.replace(kept.obj, generation=kept.obj.generation + 1)
        try:
            await self.replace(tenant, Kept(later, kept.session), kept.session, kept.obj.kv_namespace)
        except NanoVLLMError as error:
            logger.warning("A turn without its response stays in its conversation: %s", error.message)
            return False
        return True

    async def drop(self, tenant: Tenant, kind: str, given: str, param: str) -> None:
        """Out of every tier, with the KV that only it owned; again, where that was not done. Raises TierError where a
        tier did not remove it in time, StateNotFoundError."""
        left: list[StateObject] = await self._call("leaving", **_named(tenant, kind, given, param))
        obj = left[0] if left else await self.look_up(tenant, kind, given, param)
        check_removed(await self._call("drop", state_id=obj.state_id, namespace=store_namespace(tenant.owner)))

    async def written(self, namespace: str, token_ids: list[int], cache_salt: str = "") -> None:
        """Wait until the full blocks of these tokens are written behind, or the server's time for it is over.

        Losing them costs only time, so nothing that goes wrong here fails a turn.
        """
        limit_s = self.config.write_behind_timeout
        with suppress(NanoVLLMError, TimeoutError):
            async with asyncio.timeout(limit_s + 1.0):
                where = {"namespace": store_namespace(namespace), "cache_salt": cache_salt, "timeout": limit_s}
                await self.engine.call_state("written", token_ids=token_ids, **where)

    def claim(self, tenant: Tenant, kept: Kept) -> tuple[str, str]:
        """Take a conversation for one turn, until `unclaim`. Raises StateConflictError where another has it."""
        claim = tenant.owner, kept.obj.state_id
        if claim in self._busy:
            raise _conflict()
        self._busy.add(claim)
        return claim

    def unclaim(self, claim: tuple[str, str]) -> None:
        """Give it back."""
        self._busy.discard(claim)

    @contextmanager
    def claimed(self, tenant: Tenant, kept: Kept) -> Iterator[None]:
        """The same, for the time of a block."""
        claim = self.claim(tenant, kept)
        try:
            yield
        finally:
            self.unclaim(claim)

    async def _call(self, verb: str, **arguments: Any) -> Any:
        try:
            async with asyncio.timeout(STATE_S):
                return await self.engine.call_state(verb, **arguments)
        except TimeoutError:
            raise DeadlineError(f"The state did not answer within {STATE_S:g} s.") from None


def check_removed(*receipts: Receipt, hint: str = REST) -> None:
    """Raise TierError unless all of it is gone: only then a deletion may be acknowledged."""
    failed = [receipt for receipt in receipts if not receipt.ok]
    if failed:
        kind = TierFullError if any(receipt.detail.get("is_full") for receipt in failed) else TierError
        raise kind("It is not removed everywhere yet.", hint=hint)


def _named(tenant: Tenant, kind: str, given: str, param: str) -> dict[str, Any]:
    """How the state calls it. Raises StateNotFoundError where no id looks so."""
    form = _FORMS[kind].fullmatch(given)
    if form is None:
        raise _missing(kind, given, param)
    state_id = form[1] if form.groups() else given
    return {"state_id": state_id, "namespace": store_namespace(tenant.owner), "kind": KIND}


def _missing(kind: str, given: str, param: str) -> StateNotFoundError:
    hint = "It was never stored, has expired or was deleted."
    return StateNotFoundError(f"There is no {kind} {given!r:.80}.", param=param, hint=hint)


def _unreadable(kind: str, given: str, param: str) -> StateNotFoundError:
    message = f"The {kind} {given!r:.80} is there, but its bytes are lost or cannot be read."
    return StateNotFoundError(message, param=param, hint=DELETE_IT)


def _in_our_words(error: StateRefusedError | InvalidRequestError) -> NanoVLLMError:
    """Without the receipt, which may tell of others' state; an object that is too large is the input's fault."""
    if isinstance(error, StateRefusedError):
        error.receipt = None
    elif error.param == "obj":
        error.param = "input"
    return error


def _conflict() -> StateConflictError:
    return StateConflictError(
        "Another turn of this conversation is under way.", param="conversation", hint="Wait for it, then ask again."
    )
