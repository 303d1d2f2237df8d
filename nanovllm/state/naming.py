"""Naming: put, update, get, match, fork, drop. Which state exists, and how it is called.

What it is: the verbs that make and unmake objects. What it knows nothing about: which tier is best,
policies. Invariants: an object that was acknowledged as durable is on the disk, whatever happens next; one
that was refused left nothing behind; a dropped one is in no tier once the receipt says ok; a session has
one writer per generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from nanovllm.errors import (
    InvalidRequestError,
    StateConflictError,
    StateNotFoundError,
    shown,
)
from nanovllm.state.debts import DEVICE
from nanovllm.state.document_kv import left_of
from nanovllm.state.hinted import left_to_hints
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.objects import (
    KVBlock,
    Metadata,
    StateId,
    StateMatch,
    StateObject,
    Storable,
    check_namespace,
    check_tokens,
    new_state_id,
)
from nanovllm.state.payload import decode, default_kind, object_of, payload_of
from nanovllm.state.plane import Plane
from nanovllm.state.receipts import Receipt
from nanovllm.state.reclaim import Reclaim
from nanovllm.state.steps import Steps, begin
from nanovllm.state.storing import Pending, Storing

SECOND_MS = 1_000
KNOWLEDGE = "knowledge"


@dataclass
class Naming:
    """The verbs of names."""

    plane: Plane
    reclaim: Reclaim
    let_go: Callable[[str], None] = field(default=lambda state_id: None)  # ends the claims of an object that goes

    def __post_init__(self) -> None:
        self.storing = Storing(self.plane, self.reclaim, self.drop_soon)

    def put(self, obj: Storable, metadata: Metadata) -> Steps[StateId]:
        """Keep an object under a new id. Raises as `begin_put`, and StateRefusedError."""
        return (yield from self.storing.steps(self.begin_put(obj, metadata)))

    def begin_put(
        self, obj: Storable, metadata: Metadata, then: Callable[[Pending], None] = lambda pending: None
    ) -> Pending:
        """Begin to keep it. Raises TypeError, InvalidRequestError, StateConflictError."""
        started = self.plane.clock.now_ns()
        payload = payload_of(obj)
        kind = KIND_TABLE[metadata.kind or default_kind(payload)]
        if not kind.accepts(obj):
            raise InvalidRequestError(f"kind {kind.name} does not hold a {payload.form}.", param="kind")
        ttl_s = metadata.ttl if metadata.ttl is not None else kind.ttl_s
        older = self.plane.catalog.named(metadata.namespace, kind.name, metadata.name or "", None)
        new = StateObject(
            state_id=str(new_state_id()),
            kind=kind.name,
            namespace=metadata.namespace,
            name=metadata.name,
            version=metadata.version,
            created_ms=max(self.plane.wall_ms(), 0 if older is None else older.created_ms + 1),  # newest stays newest
            ttl_ms=None if ttl_s is None else int(ttl_s * SECOND_MS),
            durable=kind.durable if metadata.durable is None else metadata.durable,
            kv_namespace=metadata.kv_namespace,
        )
        return self.storing.begin(Pending("put", started, new, then=then), payload, must=metadata.durable is True)

    def begin_update(
        self,
        obj: StateObject,
        value: Storable,
        generation: int | None,
        then: Callable[[Pending], None] = lambda pending: None,
        kv_namespace: str | None = None,
        *,
        erase: bool = False,
    ) -> Pending:
        """Begin the object's next generation; `erase`: done when nothing is left of what only the last one had.

        Raises StateConflictError where it is not at `generation` any more."""
        started = self.plane.clock.now_ns()
        if generation is not None and type(generation) is not int:
            raise InvalidRequestError(f"generation must be a number, not {shown(generation)}.", param="generation")
        if generation is not None and generation != obj.generation:
            raise StateConflictError(
                f"The state is at generation {obj.generation}, not {generation}.",
                param="generation",
                hint="Read it again.",
            )
        if not KIND_TABLE[obj.kind].accepts(value):
            raise InvalidRequestError(f"kind {obj.kind} does not hold {shown(value)}.", param="obj")
        where = obj.kv_namespace if kv_namespace is None else check_namespace(kv_namespace)
        new = msgspec.structs.replace(obj, generation=obj.generation + 1, is_hint=False, kv_namespace=where)
        pending = Pending("update", started, new, old=obj, then=then, erase=erase)
        return self.storing.begin(pending, payload_of(value))

    def get(self, obj: StateObject) -> Steps[Storable]:
        """What was put. Raises StateNotFoundError where its bytes did not verify anywhere."""
        started = self.plane.clock.now_ns()
        entry = self.plane.catalog.entries.get(obj.payload_key)
        data, tier = (None, "") if entry is None else (yield from self.plane.payload(entry))
        if data is None:
            self.plane.receipt("get", started, False, "its bytes are nowhere, or did not verify", obj=obj)
            raise StateNotFoundError(
                f"The bytes of {obj.label!r} are lost.", hint="`nanovllm state verify` tells why; put it again."
            )
        if entry is not None:
            self.plane.touch(entry, obj.num_tokens, 0, hit=True)
        self.plane.receipt("get", started, True, "verified", obj=obj, tier=tier, size_bytes=len(data))
        return object_of(decode(data))

    def match(self, token_ids: Sequence[int], namespace: str) -> StateMatch:
        """How much of a prompt's KV lies somewhere. Changes nothing and touches no disk."""
        tokens = check_tokens(token_ids, "tokens")
        chain, tiers = self.plane.chain_of(tokens, check_namespace(namespace)), []
        for digest in chain:
            tier = self._fastest(digest)
            if tier is None:
                break
            tiers.append(tier)
        known = chain[: len(tiers)]
        owners = sorted(self.plane.catalog.owners(known[-1])) if known else []
        return StateMatch(self.plane.settings.block_size, known, tuple(tiers), tuple(owners))

    def blocks_of(self, obj: StateObject) -> Steps[list[KVBlock]]:
        """The blocks of its tokens under the present model; where that changed, an engine's catalog learns the chain,
        and the KV that only the old one named goes: a later drop would not find it.

        A hint has no tokens of its own: what it owns is held and dropped by digest, and not brought up.
        """
        if obj.is_hint:
            return []
        entry = self.plane.catalog.entries.get(obj.payload_key)
        data, _ = (None, "") if entry is None or not obj.num_tokens else (yield from self.plane.payload(entry))
        if data is None:
            return []
        tokens, size = decode(data).token_ids, self.plane.settings.block_size
        chain = self.plane.chain_of(tokens, obj.chain_namespace)
        is_engine = self.plane.device is not None  # else no model is known: that of the chain may come back
        if is_engine and chain != obj.chain and self.plane.catalog.objects.get(obj.state_id) is obj:
            fresh = msgspec.structs.replace(obj, chain=chain, root=self.plane.root_of(obj.chain_namespace))
            self.plane.abandon(self.plane.catalog.change(fresh))
            self.plane.rekind((*obj.chain, *chain))
        parents = (None, *chain)
        cuts = [tuple(tokens[i : i + size]) for i in range(0, len(chain) * size, size)]
        return [KVBlock(*row, obj.chain_namespace) for row in zip(chain, parents, cuts)]

    def fork(self, obj: StateObject, metadata: Metadata) -> Steps[StateId]:
        """A new object that begins as this one and goes its own way; their KV is shared.

        Raises as `begin_put`, and where another kind is asked for (InvalidRequestError) or the very name of the first
        (StateConflictError).
        """
        _check_fork(obj, metadata)
        started = self.plane.clock.now_ns()
        payload = payload_of((yield from self.get(obj)))
        own = obj.kv_namespace if metadata.namespace == obj.namespace else None
        new = msgspec.structs.replace(
            obj,
            state_id=str(new_state_id()),
            namespace=metadata.namespace,
            name=metadata.name,
            version=metadata.version,
            kv_namespace=metadata.kv_namespace or own,
            forked_from=obj.state_id,
            generation=1,
            created_ms=self.plane.wall_ms(),
            ttl_ms=obj.ttl_ms if metadata.ttl is None else int(metadata.ttl * SECOND_MS),
            durable=obj.durable if metadata.durable is None else metadata.durable,
        )
        pending = Pending("fork", started, new, chain=obj.chain if obj.is_hint else None)
        return (yield from self.storing.steps(self.storing.begin(pending, payload, must=metadata.durable is True)))

    def drop(self, obj: StateObject, reason: str) -> Steps[Receipt]:
        """Out of every tier: its text, and the blocks that only it, or hints beside it, owned; of a document those that
        others computed of it, too. Its id and name find nothing from the first step on; the receipt comes when the
        bytes are gone. Where a tier kept some, another drop tries them again."""
        started = self.plane.clock.now_ns()
        condemned = self.plane.debts.keys_of(obj)
        if obj.state_id in self.plane.catalog.objects:
            condemned += yield from self._strike_out(obj)
        keys = [key for key in dict.fromkeys(condemned) if not self.plane.catalog.owners(key)]
        size, removals = self.plane.forget(keys, scrub=True)
        self.plane.rekind(obj.chain)
        kept = self._discard(keys)
        yield from removals.values()
        failed = [name for name, removal in removals.items() if not removal.ok]
        is_full = any(removals[name].is_full for name in failed)
        detail = {"keys": len(keys), "blocks_in_use": len(kept), **({"is_full": True} if is_full else {})}
        if kept:
            reason += f"; {len(kept)} blocks go when the sequences that run on them end"
        if failed:
            reason += f"; not yet removed from {', '.join(failed)}: it will be tried again"
            self.plane.debts.remember(obj, keys)
        return self.plane.receipt("drop", started, not failed, reason, obj=obj, size_bytes=size, detail=detail)

    def _strike_out(self, obj: StateObject) -> Steps[list[bytes]]:
        """Nobody finds it from here on; the keys of all that goes with it."""
        self.let_go(obj.state_id)
        alone = self.plane.catalog.remove(obj)
        is_document = obj.kind == KNOWLEDGE
        left = (yield from left_of(self.plane, obj)) if is_document else left_to_hints(self.plane, obj)
        return list(dict.fromkeys((*alone, *left)))

    def drop_soon(self, obj: StateObject, reason: str) -> None:
        """As `drop`, for whom nobody waits."""
        begin(self.drop(obj, reason), lambda receipt, error: None)

    def _discard(self, keys: Sequence[bytes]) -> list[bytes]:
        """Take them out of the pool; the ones that somebody runs on go when that ends."""
        device = self.plane.device
        if device is None:
            return []
        kept = [key for key in keys if device.holds(key) and not device.discard(key)]
        if kept:
            self.plane.debts.owe(DEVICE, kept)
        return kept

    def _fastest(self, digest: bytes) -> str | None:
        if self.plane.device is not None and self.plane.device.holds(digest):
            return "device"
        entry = self.plane.catalog.entries.get(digest)
        if entry is None or entry.label.layout != self.plane.layout:
            return None
        return next((name for name in self.plane.places if name in entry.tiers), None)


def _check_fork(obj: StateObject, metadata: Metadata) -> None:
    """A fork is of the first one's kind, and does not put it out."""
    if metadata.kind not in (None, obj.kind):
        raise InvalidRequestError(f"A fork is of kind {obj.kind}, as the first one is.", param="kind")
    called = metadata.namespace, metadata.name, metadata.version
    if metadata.name is not None and called == (obj.namespace, obj.name, obj.version):
        raise StateConflictError(f"The first one is called {obj.label!r}.", param="name", hint="Give another name.")
