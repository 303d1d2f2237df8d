"""Storing: objects on their way to the tier that answers for them.

What it is: the one way by which `put`, `update`, `fork` and `import_` make bytes and the catalog agree.
What it knows nothing about: what the verbs check beforehand. Invariants: an object is in the catalog only
once its bytes are where they are promised; one that was refused left nothing behind; a name or an object
that is on its way is reserved, so that of two at once one is refused. Durable writes that come while one
is under way share the next group commit (`plane.write`).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from nanovllm.core.digest import Digest
from nanovllm.errors import NanoVLLMError, StateConflictError, StateNotFoundError, StateRefusedError
from nanovllm.state.catalog import Entry
from nanovllm.state.envelope import Label, seal
from nanovllm.state.hinted import left_to_hints
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.mover import Transfer
from nanovllm.state.objects import StateId, StateObject
from nanovllm.state.payload import Payload, encode
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane, bare
from nanovllm.state.receipts import Receipt
from nanovllm.state.reclaim import Reclaim
from nanovllm.state.shelves import ShelfKey, shelf_of
from nanovllm.state.steps import Steps, after

MORE_ROOM = "Drop some, unpin some, or make room where the tier lies."
NOT_WRITTEN = "What is kept can still be read. See whether the place of the tier can be written, then try again."


@dataclass(eq=False)
class Pending:
    """An object on its way. Once `done`, `result` is its id with the receipt, or raises why it was refused.

    `chain`: the blocks it owns, where they do not follow from its tokens.
    """

    action: str
    started_ns: int
    new: StateObject
    old: StateObject | None = None
    chain: tuple[Digest, ...] | None = None
    data: bytes = b""
    transfer: Transfer | None = None
    receipt: Receipt | None = None
    error: NanoVLLMError | None = None
    erase: bool = False  # done when what only the generation before had is gone, too
    left: list[bytes] = field(default_factory=list)  # what that is
    removals: dict[str, Transfer] = field(default_factory=dict)
    then: Callable[[Pending], None] = field(default=lambda pending: None)

    @property
    def done(self) -> bool:
        """Whether it was kept or refused."""
        return self.receipt is not None

    def result(self) -> StateId:
        """The id. Raises StateRefusedError, StateNotFoundError (dropped meanwhile)."""
        if self.error is not None:
            raise self.error
        state_id = StateId(self.new.state_id)
        state_id.receipt = self.receipt
        return state_id


@dataclass
class Storing:
    """Begins and ends the keeping of objects."""

    plane: Plane
    reclaim: Reclaim
    remove: Callable[[StateObject, str], object]  # drops an object whose name was taken
    _reserved: set[tuple[str, ...]] = field(default_factory=set)
    _objects_coming: Counter[ShelfKey] = field(default_factory=Counter)
    _bytes_coming: Counter[ShelfKey] = field(default_factory=Counter)

    def begin(self, pending: Pending, payload: Payload, *, must: bool = False) -> Pending:
        """Write the payload to its home; it is done when that was reported. Raises where it cannot even begin."""
        pending.data = encode(payload, self.plane.settings.max_object_bytes)
        self._check(pending)
        pending.new = self._filled(pending, payload)
        home = self._home(pending.new, must)
        if home is None:
            self._refuse(pending, "there is no tier for it", hint="Give the state some memory or a folder.")
            return pending
        sealed = seal(payload_label(pending.new), pending.data)
        limit = self._limit_of(pending, home, len(sealed))
        if limit:
            self._refuse(pending, limit, hint="Drop some.")
            return pending
        if self.reclaim.make_room(home, len(sealed), pending.new.namespace) is None:
            self._refuse(pending, f"{home.name} is full, and everything in it is held", hint=MORE_ROOM)
            return pending
        self._reserve(pending)
        home.texts_coming[pending.new.namespace] += len(sealed)
        new = pending.new
        entry = Entry(bare(payload_label(new)), new.kind, len(sealed), max(new.num_tokens, 1), home=home.name)
        pending.transfer = self.plane.write(
            home, [(entry, sealed)], durable=new.durable, then=lambda t: self._written(pending, home, entry, sealed, t)
        )
        return pending

    def steps(self, pending: Pending) -> Steps[StateId]:
        """To its end. Raises as `result`."""
        if pending.transfer is not None:
            yield pending.transfer
        yield from pending.removals.values()
        return pending.result()

    def _written(self, pending: Pending, home: Place, entry: Entry, sealed: bytes, transfer: Transfer) -> None:
        self._unreserve(pending)
        home.texts_coming[pending.new.namespace] -= len(sealed)
        if not transfer.ok:
            self._refuse(pending, transfer.reason, hint=MORE_ROOM if transfer.is_full else NOT_WRITTEN)
            return
        if pending.old is not None and pending.old.state_id not in self.plane.catalog.objects:
            self.plane.forget([entry.key], scrub=True)
            self._refuse(pending, "it was dropped meanwhile", StateNotFoundError("The state was dropped meanwhile."))
            return
        self._copy_to_faster(entry, sealed, home)
        self._enter(pending, home)

    def _enter(self, pending: Pending, home: Place) -> None:
        new, displaced = pending.new, None
        if pending.old is None:
            displaced = self.plane.catalog.add(new)
        else:
            old = self.plane.catalog.objects[new.state_id]  # maybe with another chain than when this began
            alone = [*self.plane.catalog.change(new), *left_to_hints(self.plane, old)]
            left = [old.payload_key] if new.is_hint else alone  # a hint's blocks were anybody's before, and are again
            removals = self.plane.abandon(left)
            self.plane.rekind(old.chain)
            if pending.erase:
                pending.left, pending.removals = left, removals
        self.plane.rekind(new.chain)
        if displaced is not None:
            self.remove(displaced, f"replaced by {new.state_id}")
        self._finish_after([*pending.removals.values()], pending, home)

    def _finish_after(self, removals: list[Transfer], pending: Pending, home: Place) -> None:
        if removals:
            after(removals[0], lambda: self._finish_after(removals[1:], pending, home))
        else:
            self._finish(pending, home)

    def _finish(self, pending: Pending, home: Place) -> None:
        """It is kept; with `erase` the receipt is not ok where a tier still has something of what it replaced."""
        new = pending.new
        failed = {name: removal for name, removal in pending.removals.items() if not removal.ok}
        reason = "durable" if new.durable else f"in {home.name}, and gone with it"
        detail = {"generation": new.generation, "tokens": new.num_tokens, "blocks": len(new.chain)}
        if failed:
            self.plane.debts.remember(new, pending.left)
            reason += f"; what it replaced is not yet removed from {', '.join(failed)}: it will be tried again"
            detail |= {"is_full": True} if any(removal.is_full for removal in failed.values()) else {}
        pending.receipt = self.plane.receipt(
            pending.action, pending.started_ns, not failed, reason,
            obj=new, tier=home.name, size_bytes=len(pending.data), detail=detail,
        )  # fmt: skip
        pending.then(pending)

    def _refuse(
        self, pending: Pending, reason: str, error: NanoVLLMError | None = None, *, hint: str | None = None
    ) -> None:
        receipt = self.plane.receipt(
            pending.action, pending.started_ns, False, reason, obj=pending.old, size_bytes=len(pending.data)
        )
        why = f"The object was not kept: {reason.rstrip('.')}."
        pending.error = error or StateRefusedError(why, receipt=receipt, hint=hint)
        pending.receipt = receipt
        pending.then(pending)

    def _check(self, pending: Pending) -> None:
        """Names that are taken, changes that are under way."""
        new, kind = pending.new, KIND_TABLE[pending.new.kind]
        if pending.old is not None:
            if ("object", new.state_id) in self._reserved:
                raise StateConflictError("Another change of this state is under way.", hint="Try again.")
            return
        if new.name is None:
            return
        old = self.plane.catalog.named(new.namespace, new.kind, new.name, new.version)
        taken = old is not None and old.version == new.version and not kind.replaces(old, new)
        if taken or self._claims(pending) & self._reserved:
            raise StateConflictError(f"There is a {new.kind} called {new.label!r} already.", param="name")

    def room(self, namespace: str, kind: str) -> tuple[int, int]:
        """How many more objects of a kind, and bytes of them, a tenant may put now, what is on its way aside."""
        objects_left, bytes_left = self._left(ShelfKey(namespace, kind))
        home = self._home_of(durable=KIND_TABLE[kind].durable, must=False)
        if home is not None:
            bytes_left = min(bytes_left, self._share_left(home, namespace))
        return max(objects_left, 0), max(bytes_left, 0)

    def _limit_of(self, pending: Pending, home: Place, sealed_size: int) -> str:
        """Which bound of its tenant's it would pass, as a sentence. An update may have the room of what it replaces."""
        new, old, settings = pending.new, pending.old, self.plane.settings
        objects_left, bytes_left = self._left(shelf_of(new))
        replaced = None if old is None else self.plane.catalog.entries.get(old.payload_key)
        share = self._share_left(home, new.namespace, is_hint=new.is_hint)
        share += replaced.size_bytes if replaced is not None and replaced.home == home.name else 0
        if sealed_size > share:
            return f"{home.name} has {max(share, 0):,} bytes left for texts of this namespace"
        if new.is_hint:
            return ""
        if old is None and objects_left < 1:
            return f"the namespace holds {settings.objects_per_namespace:,} objects of kind {new.kind} already"
        if len(pending.data) > bytes_left + (0 if old is None else old.payload_bytes):
            most, size = settings.text_bytes_per_namespace, settings.text_bytes_per_namespace - bytes_left
            return f"the namespace holds {size:,} bytes of kind {new.kind}; {most:,} is the most"
        return ""

    def _left(self, key: ShelfKey) -> tuple[int, int]:
        """Objects and bytes up to the bounds of a tenant's kind, what is on its way aside."""
        settings, (objects, size) = self.plane.settings, self.plane.catalog.holds(*key)
        objects_left = settings.objects_per_namespace - objects - self._objects_coming[key]
        return objects_left, settings.text_bytes_per_namespace - size - self._bytes_coming[key]

    def _share_left(self, home: Place, namespace: str, *, is_hint: bool = False) -> int:
        """Half of what the others' texts leave of the tier, less one's own; hints end at a quarter.

        So whoever comes next finds room: nothing evicts a text (Choudhury and Hahne's dynamic threshold, 1998).
        """
        quota, own = home.tier.quota_bytes, home.texts[namespace] + home.texts_coming[namespace]
        if quota is None:
            return sys.maxsize
        others = home.texts.total() + home.texts_coming.total() - own
        return (quota - others) // (4 if is_hint else 2) - own

    def _claims(self, pending: Pending) -> set[tuple[str, ...]]:
        new = pending.new
        if pending.old is not None:
            return {("object", new.state_id)}
        return set() if new.name is None else {("name", new.namespace, new.kind, new.name, new.version or "")}

    def _reserve(self, pending: Pending) -> None:
        self._reserved |= self._claims(pending)
        self._count_coming(pending, 1)

    def _unreserve(self, pending: Pending) -> None:
        self._reserved -= self._claims(pending)
        self._count_coming(pending, -1)

    def _count_coming(self, pending: Pending, sign: int) -> None:
        key = shelf_of(pending.new)
        self._objects_coming[key] += sign * (pending.old is None)
        self._bytes_coming[key] += sign * len(pending.data)

    def _filled(self, pending: Pending, payload: Payload) -> StateObject:
        """With what follows from the payload: chain, sizes, key, expiry."""
        new, chain = pending.new, pending.chain
        return msgspec.structs.replace(
            new,
            chain=self.plane.chain_of(payload.token_ids, new.chain_namespace) if chain is None else chain,
            root=self.plane.root_of(new.chain_namespace),
            num_tokens=len(payload.token_ids) if chain is None else len(chain) * self.plane.settings.block_size,
            payload_bytes=len(pending.data),
            payload_key=payload_key(new.state_id, new.generation),
            expires_ms=None if new.ttl_ms is None else self.plane.wall_ms() + new.ttl_ms,
        )

    def _home(self, new: StateObject, must: bool) -> Place | None:
        """The tier that answers for the object; whether it can be durable is known from now on."""
        home = self._home_of(durable=new.durable, must=must)
        new.durable = new.durable and home is not None and home.tier.durable
        return home

    def _home_of(self, *, durable: bool, must: bool) -> Place | None:
        """The durable tier where that is wanted, else the fastest of our own, unless it must be the durable one."""
        places = [place for place in self.plane.places.values() if durable and place.tier.durable]
        own = [] if must else [place for place in self.plane.places.values() if not place.tier.shared]
        return next(iter([*places, *own]), None)

    def _copy_to_faster(self, entry: Entry, sealed: bytes, home: Place) -> None:
        """A copy in memory answers `get`; it may go at any time."""
        fastest = next(iter(self.plane.places.values()))
        if fastest is not home and self.reclaim.make_room(fastest, len(sealed)) is not None:
            self.plane.write(fastest, [(entry, sealed)])


def payload_key(state_id: str, generation: int) -> bytes:
    """Where an object's payload lies: 16 bytes of its id, its generation, and the moment.

    Each attempt to write a generation has a key of its own: what a late one leaves is removed without touching the
    one that was acknowledged, and of two that a crash left the later counts.
    """
    return bytes.fromhex(state_id) + generation.to_bytes(8, "big") + time.time_ns().to_bytes(8, "big")


def payload_label(obj: StateObject) -> Label:
    """The label of an object's payload: it carries the object's whole record, so that the file alone suffices."""
    record = msgspec.msgpack.encode(obj)
    return Label(key=obj.payload_key, kind=obj.kind, namespace=obj.namespace, generation=obj.generation, record=record)
