"""Naming: put, update, get, match, fork, drop. Which state exists, and how it is called.

What it is: the verbs that make and unmake objects. What it knows nothing about: which tier is best,
policies. Invariants: an object that was acknowledged as durable is on the disk, whatever happens next; one
that was refused left nothing behind; a dropped one is in no tier once the receipt says ok; a session has
one writer per generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nanovllm.errors import (
    InvalidRequestError,
    StateConflictError,
    StateNotFoundError,
    StateRefusedError,
    shown,
)
from nanovllm.state.catalog import Entry
from nanovllm.state.envelope import Label, seal
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
from nanovllm.state.payload import Payload, decode, default_kind, encode, object_of, payload_of
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane, bare
from nanovllm.state.receipts import Receipt
from nanovllm.state.reclaim import Reclaim

SECOND_MS = 1_000


@dataclass
class Naming:
    """The verbs of names."""

    plane: Plane
    reclaim: Reclaim

    def put(self, obj: Storable, metadata: Metadata) -> StateId:
        """Keep an object under a new id. Raises TypeError, InvalidRequest-, StateConflict-, StateRefusedError."""
        started = self.plane.clock.now_ns()
        payload = payload_of(obj)
        kind = KIND_TABLE[metadata.kind or default_kind(payload)]
        if not kind.accepts(obj):
            raise InvalidRequestError(f"kind {kind.name} does not hold a {payload.form}.", param="kind")
        self._check_room_for_one(metadata.namespace)
        ttl_s = metadata.ttl if metadata.ttl is not None else kind.ttl_s
        new = StateObject(
            state_id=str(new_state_id()),
            kind=kind.name,
            namespace=metadata.namespace,
            name=metadata.name,
            version=metadata.version,
            created_ms=self.plane.wall_ms(),
            ttl_ms=None if ttl_s is None else int(ttl_s * SECOND_MS),
            durable=kind.durable if metadata.durable is None else metadata.durable,
        )
        self._check_name(new)
        receipt = self._store(new, payload, started, "put", must=metadata.durable is True)
        return _answer(new, receipt)

    def update(self, obj: StateObject, value: Storable, generation: int | None) -> Receipt:
        """The object's next generation. Raises StateConflictError where it is not at `generation` any more."""
        started = self.plane.clock.now_ns()
        if generation is not None and generation != obj.generation:
            raise StateConflictError(
                f"The state is at generation {obj.generation}, not {generation}.",
                param="generation",
                hint="Read it again.",
            )
        if not KIND_TABLE[obj.kind].accepts(value):
            raise InvalidRequestError(f"kind {obj.kind} does not hold {shown(value)}.", param="obj")
        new = msgspec.structs.replace(obj, generation=obj.generation + 1)
        return self._store(new, payload_of(value), started, "update", old=obj)

    def get(self, obj: StateObject) -> Storable:
        """What was put. Raises StateNotFoundError where its bytes did not verify anywhere."""
        started = self.plane.clock.now_ns()
        entry = self.plane.catalog.entries.get(obj.payload_key)
        data, tier = (None, "") if entry is None else self.plane.payload(entry)
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

    def blocks_of(self, obj: StateObject) -> list[KVBlock]:
        """The blocks of its tokens under the present model; the catalog learns the chain where the model changed."""
        entry = self.plane.catalog.entries.get(obj.payload_key)
        data, _ = (None, "") if entry is None or not obj.num_tokens else self.plane.payload(entry)
        if data is None:
            return []
        tokens, size = decode(data).token_ids, self.plane.settings.block_size
        chain = self.plane.chain_of(tokens, obj.namespace)
        if chain != obj.chain:
            fresh = msgspec.structs.replace(obj, chain=chain, root=self.plane.root_of(obj.namespace))
            self.plane.catalog.change(obj, fresh)
        parents = (None, *chain)
        cuts = [tuple(tokens[i : i + size]) for i in range(0, len(chain) * size, size)]
        return [KVBlock(*row, obj.namespace) for row in zip(chain, parents, cuts)]

    def fork(self, obj: StateObject, metadata: Metadata) -> StateId:
        """A new object that begins as this one and goes its own way; their KV is shared."""
        started = self.plane.clock.now_ns()
        payload = payload_of(self.get(obj))
        self._check_room_for_one(metadata.namespace)
        new = msgspec.structs.replace(
            obj,
            state_id=str(new_state_id()),
            namespace=metadata.namespace,
            name=metadata.name,
            version=metadata.version,
            forked_from=obj.state_id,
            generation=1,
            created_ms=self.plane.wall_ms(),
        )
        self._check_name(new)
        receipt = self._store(new, payload, started, "fork")
        return _answer(new, receipt)

    def drop(self, obj: StateObject, reason: str) -> Receipt:
        """Out of every tier: its text, and the blocks that only it owned."""
        started = self.plane.clock.now_ns()
        keys = self.plane.catalog.remove(obj)
        size, failed = self.plane.forget(keys, scrub=True)
        device = self.plane.device
        in_use = [key for key in obj.chain if key in set(keys) and device and device.holds(key)]
        kept = [key for key in in_use if device is not None and not device.discard(key)]
        detail = {"keys": len(keys), "blocks_in_use": len(kept)}
        if kept:
            self.plane.owed.setdefault("device", set()).update(kept)
            reason += f"; {len(kept)} blocks go when the sequences that run on them end"
        if failed:
            reason += f"; not yet removed from {', '.join(failed)}: it will be tried again"
        return self.plane.receipt("drop", started, not failed, reason, obj=obj, size_bytes=size, detail=detail)

    def _store(
        self,
        new: StateObject,
        payload: Payload,
        started: int,
        action: str,
        *,
        old: StateObject | None = None,
        must: bool = False,
    ) -> Receipt:
        """Write the payload where it is at home, and enter the object once it is there."""
        data = encode(payload, self.plane.settings.max_object_bytes)
        new = self._filled(new, payload, data)
        home = self._home(new, must)
        refusal = "there is no tier for it" if home is None else self._write_home(new, data, home)
        if home is None or refusal:
            receipt = self.plane.receipt(action, started, False, refusal, obj=old, size_bytes=len(data))
            raise StateRefusedError(f"The object was not kept: {refusal}.", receipt=receipt)
        displaced = self._enter(new, old)
        reason = "durable" if new.durable else f"in {home.name}, and gone with it"
        receipt = self.plane.receipt(
            action, started, True, reason, obj=new, tier=home.name, size_bytes=len(data),
            detail={"generation": new.generation, "tokens": new.num_tokens, "blocks": len(new.chain)},
        )  # fmt: skip
        if displaced is not None:
            self.drop(displaced, f"replaced by {new.state_id}")
        return receipt

    def _filled(self, new: StateObject, payload: Payload, data: bytes) -> StateObject:
        """With what follows from the payload: chain, sizes, key, expiry."""
        chain = self.plane.chain_of(payload.token_ids, new.namespace)
        expires = None if new.ttl_ms is None else self.plane.wall_ms() + new.ttl_ms
        root = self.plane.root_of(new.namespace)
        return msgspec.structs.replace(
            new, chain=chain, root=root, num_tokens=len(payload.token_ids), payload_bytes=len(data),
            payload_key=payload_key(new.state_id, new.generation), expires_ms=expires,
        )  # fmt: skip

    def _home(self, new: StateObject, must: bool) -> Place | None:
        """The tier that answers for the object: the durable one, else the fastest of our own."""
        for place in self.plane.places.values():
            if new.durable and place.tier.durable:
                return place
        if must:
            return None
        new.durable = False
        return next((place for place in self.plane.places.values() if not place.tier.shared), None)

    def _write_home(self, new: StateObject, data: bytes, home: Place) -> str:
        """Empty when it is there; else why not."""
        label = payload_label(new)
        sealed = seal(label, data)
        if self.reclaim.make_room(home, len(sealed), new.namespace) is None:
            return f"{home.name} is full, and everything in it is held"
        entry = Entry(bare(label), new.kind, len(sealed), max(new.num_tokens, 1), home=home.name)
        transfer = self.plane.mover.wait(self.plane.write(home, [(entry, sealed)], durable=new.durable))
        if not transfer.ok:
            return transfer.reason
        self._copy_to_faster(entry, sealed, home)
        return ""

    def _copy_to_faster(self, entry: Entry, sealed: bytes, home: Place) -> None:
        """A copy in memory answers `get`; it may go at any time."""
        fastest = next(iter(self.plane.places.values()))
        if fastest is not home and self.reclaim.make_room(fastest, len(sealed)) is not None:
            self.plane.write(fastest, [(entry, sealed)])

    def _enter(self, new: StateObject, old: StateObject | None) -> StateObject | None:
        if old is None:
            return self.plane.catalog.add(new)
        self.plane.catalog.change(old, new)
        self.plane.forget([old.payload_key], scrub=True)
        return None

    def _check_name(self, new: StateObject) -> None:
        if new.name is None:
            return
        old = self.plane.catalog.named(new.namespace, new.kind, new.name, new.version)
        if old is not None and old.version == new.version and not KIND_TABLE[new.kind].replaces(old, new):
            raise StateConflictError(f"There is a {new.kind} called {new.label!r} already.", param="name")

    def _check_room_for_one(self, namespace: str) -> None:
        limit = self.plane.settings.objects_per_namespace
        if self.plane.catalog.count_in(namespace) >= limit:
            raise StateRefusedError(f"The namespace holds {limit:,} objects already.", hint="Drop some.")

    def _fastest(self, digest: bytes) -> str | None:
        if self.plane.device is not None and self.plane.device.holds(digest):
            return "device"
        entry = self.plane.catalog.entries.get(digest)
        if entry is None or entry.label.layout != self.plane.layout:
            return None
        return next((name for name in self.plane.places if name in entry.tiers), None)


def payload_key(state_id: str, generation: int) -> bytes:
    """Where an object's payload lies: 16 bytes of its id, its generation, and 8 that no digest chain makes."""
    return bytes.fromhex(state_id) + generation.to_bytes(8, "big") + b"payload."


def payload_label(obj: StateObject) -> Label:
    """The label of an object's payload: it carries the object's whole record, so that the file alone suffices."""
    record = msgspec.msgpack.encode(obj)
    return Label(key=obj.payload_key, kind=obj.kind, namespace=obj.namespace, generation=obj.generation, record=record)


def _answer(obj: StateObject, receipt: Receipt) -> StateId:
    state_id = StateId(obj.state_id)
    state_id.receipt = receipt
    return state_id
