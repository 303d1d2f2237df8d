"""The plane: catalog, places and mover together, and the three things done with bytes: write, read, forget.

What it is: the state that every verb works on, and the movements that all of them share. What it knows
nothing about: what a verb means, which bytes are worth keeping, the engine.

Invariants: bytes are written sealed and read verified, in this one module; whatever fails to verify is
counted, set aside and a miss; an entry is found in a tier only after its write has been reported; bytes
whose entry is gone when their write ends are removed again. One thread calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nanovllm.core.clock import Clock
from nanovllm.core.digest import Digest, DigestFn, block_digest
from nanovllm.state.breaker import CircuitBreaker
from nanovllm.state.catalog import Catalog, Entry
from nanovllm.state.debts import DEVICE, Debts
from nanovllm.state.envelope import BadEnvelope, Label, seal, unseal
from nanovllm.state.mover import BUSY, MILLISECOND, Mover, Transfer
from nanovllm.state.objects import StateObject
from nanovllm.state.place import Flight, Place
from nanovllm.state.policies.policy import Policy
from nanovllm.state.receipts import SHOWN_CANDIDATES, Candidate, History, Receipt
from nanovllm.state.settings import StateSettings
from nanovllm.state.steps import Steps
from nanovllm.state.tiers.device import DeviceTier
from nanovllm.state.tiers.tier import Item

FULL = "full"
MAX_GROUP = 64  # durable writes that share a commit


@dataclass(eq=False)
class Plane:
    """Everything that the verbs share. `places` stand from the fastest to the slowest."""

    places: dict[str, Place]
    settings: StateSettings
    clock: Clock
    wall_ms: Callable[[], int]
    root_of: Callable[[str], Digest]
    make_policy: Callable[[str], Policy]
    device: DeviceTier | None = None
    digest_fn: DigestFn = block_digest
    catalog: Catalog = field(default_factory=Catalog)
    history: History = field(default_factory=History)
    debts: Debts = field(default_factory=Debts)
    uses: int = 0

    def __post_init__(self) -> None:
        self.mover = Mover(self.clock)

    @property
    def layout(self) -> str:
        """How a block's bytes lie here."""
        return self.settings.layout if self.device is None else self.device.layout

    @property
    def layers(self) -> int:
        """Ranges of a block's envelope: one per layer."""
        return self.settings.layers if self.device is None else self.device.num_layers

    def chain_of(self, token_ids: Sequence[int], namespace: str, root: Digest | None = None) -> tuple[Digest, ...]:
        """The digests of the full blocks of a prompt; behind another `root` where it has a salt of its own."""
        size, parent, chain = self.settings.block_size, root or self.root_of(namespace), []
        for start in range(0, len(token_ids) - size + 1, size):
            parent = self.digest_fn(parent, token_ids[start : start + size])
            chain.append(parent)
        return tuple(chain)

    def is_known(self, obj: StateObject) -> bool:
        """Whether its chain is that of the present model and block size, so that its KV can be used."""
        same_size = len(obj.chain) == obj.num_tokens // self.settings.block_size
        return same_size and obj.root == self.root_of(obj.chain_namespace)

    def rekind(self, keys: Iterable[bytes]) -> None:
        """These blocks' owners changed: each counts as what owns it now, in every tier's books."""
        for key in keys:
            entry = self.catalog.entries.get(key)
            if entry is not None and entry.home is None and entry.kind != self.catalog.kind_of(key):
                places = [self.places[name] for name in entry.tiers]
                for place in places:
                    place.leave(entry, by_policy=False)
                entry.kind = self.catalog.kind_of(key)
                for place in places:
                    place.enter(entry)

    def touch(self, entry: Entry, cached: int, new: int, *, hit: bool) -> None:
        """A use, told to the policy of every tier that holds it."""
        self.uses += 1
        entry.last_use = self.uses
        for name in entry.tiers:
            self.places[name].victims.touch(entry, cached, new, hit)

    def write(
        self,
        place: Place,
        pairs: Sequence[tuple[Entry, bytes]],
        *,
        durable: bool = False,
        then: Callable[[Transfer], None] = lambda transfer: None,
    ) -> Transfer:
        """Begin to write sealed bytes; the entries are in the catalog from now on and in the tier once it ends."""
        size = sum(len(sealed) for _, sealed in pairs)
        entries = [entry for entry, _ in pairs]
        for entry in entries:
            self.catalog.entries.setdefault(entry.key, entry)
            entry.arriving.add(place.name)
        place.busy_bytes += size

        def ended(transfer: Transfer) -> None:
            place.busy_bytes -= size
            self._written(place, entries, size, transfer)
            then(transfer)

        if not self._may_write(place, durable):
            return self._refused(f"{place.name} is left alone: {place.writes.reason}", ended)
        flight = Flight([Item(entry.key, sealed, durable) for entry, sealed in pairs], self.mover.promise(ended))
        if not durable:
            self._fly(place, [flight])
        else:
            place.group.append(flight)
            if not place.is_committing:
                self._commit_group(place)
        return flight.promise

    def _commit_group(self, place: Place) -> None:
        """Group commit: what came while the last group was written is the next group."""
        group, place.group = place.group[:MAX_GROUP], place.group[MAX_GROUP:]
        place.is_committing = bool(group)
        if group:
            self._fly(place, group, lambda: self._commit_group(place))

    def _fly(self, place: Place, flights: Sequence[Flight], landed: Callable[[], None] = lambda: None) -> None:
        items = [item for flight in flights for item in flight.items]

        def ended(transfer: Transfer) -> None:
            with ExitStack() as each:  # all are told, whatever one of them raises
                each.callback(landed)
                for flight in reversed(flights):
                    each.callback(self.mover.keep, flight.promise, transfer)

        def late(_: object) -> None:
            unwanted = [item.key for item in items if not self._is_wanted(place, item.key)]
            self._remove(place, unwanted, scrub=True)

        deadline = self.settings.write_deadline_ms
        self.mover.start(place.write_lane, lambda: place.tier.write(items), deadline_ms=deadline, then=ended, late=late)

    def read(
        self,
        place: Place,
        labels: Sequence[Label],
        then: Callable[[Transfer], None] = lambda transfer: None,
        *,
        sealed: bool = False,
    ) -> Transfer:
        """Begin to read; `result` becomes the verified payloads, None for every miss, whatever its cause.

        `sealed`: the envelopes as they lie there instead, verified all the same.
        """
        keys = [label.key for label in labels]

        def job() -> list[bytes | str | None]:
            return [opened(found, label, whole=sealed) for found, label in zip(place.tier.read(keys), labels)]

        def ended(transfer: Transfer) -> None:
            transfer.result = self._verified(place, labels, transfer)
            then(transfer)

        if not place.reads.allow():
            return self._refused(f"{place.name} is left alone: {place.reads.reason}", ended)
        return self.mover.start(place.read_lane, job, deadline_ms=self.settings.read_deadline_ms, then=ended)

    def payload(self, entry: Entry) -> Steps[tuple[bytes | None, str]]:
        """Verified bytes from the fastest tier that has them, and which. (None, "") where none has."""
        for place in list(self.places.values()):
            if place.name in entry.tiers:
                transfer = self.read(place, [entry.label])
                yield transfer
                if transfer.result[0] is not None:
                    return transfer.result[0], place.name
        return None, ""

    def forget(self, keys: Sequence[bytes], *, scrub: bool) -> tuple[int, dict[str, Transfer]]:
        """Begin to remove bytes from every tier; how many were there, and each tier's removal."""
        gone = [entry for key in keys if (entry := self.catalog.entries.pop(key, None)) is not None]
        size = sum(entry.size_bytes * len(entry.tiers) for entry in gone)
        removals = {}
        for place in self.places.values():
            for entry in gone:
                place.leave(entry, by_policy=False)
            if keys:
                removals[place.name] = self._remove(place, keys, scrub=scrub)
        return size, removals

    def abandon(self, keys: Sequence[bytes]) -> dict[str, Transfer]:
        """What an object owned alone and owns no more goes, so that dropping the object leaves nothing of it; each
        tier's removal."""
        _, removals = self.forget(keys, scrub=True)
        if self.device is not None:
            self.debts.owe(DEVICE, keys)
        return removals

    def evict(self, place: Place, entry: Entry) -> None:
        """The policy's choice goes from one tier; `flush` tells the tier, once for all that went."""
        place.leave(entry, by_policy=True)
        place.tally.evicted(entry.kind, entry.size_bytes)
        place.going.append(entry.key)
        place.going_bytes += entry.size_bytes
        self._forget_if_nowhere(entry)

    def flush(self, place: Place) -> None:
        """Begin to remove what was evicted; its room may be planned with already."""
        keys, size = place.going, place.going_bytes
        if keys:
            place.going, place.going_bytes = [], 0
            self._remove(place, keys, scrub=False, size=size)

    def is_condemned(self, key: bytes) -> bool:
        """Whether this block goes from the device as soon as nobody runs on it: no copy of it is made any more."""
        return key in self.debts.by_tier[DEVICE] and not self.catalog.owners(key)

    def pay_debts(self) -> None:
        """Try again what tiers did not remove, but for what was written there anew."""
        if self.device is not None and self.debts.by_tier[DEVICE]:
            unowned = [key for key in self.debts.by_tier[DEVICE] if not self.catalog.owners(key)]
            self.debts.by_tier[DEVICE] = {k for k in unowned if self.device.holds(k) and not self.device.discard(k)}
        for name, place in self.places.items():
            owed = self.debts.by_tier[name]
            if owed and place.writes.state != "open" and (place.payment is None or place.payment.done):
                self.debts.settle(name, [key for key in owed if self._is_wanted(place, key)])
                if owed:
                    place.payment = self._remove(place, [*owed], scrub=True)

    def receipt(
        self,
        action: str,
        started_ns: int,
        ok: bool,
        reason: str,
        *,
        obj: StateObject | None = None,
        tier: str | None = None,
        size_bytes: int = 0,
        candidates: Sequence[Candidate] = (),
        concerns: Sequence[str] = (),
        detail: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Make the action's receipt and enter it into the history of all it concerns."""
        state_id = None if obj is None else obj.state_id
        receipt = Receipt(
            self.history.next_seq(), action, ok, reason, state_id, tier, size_bytes,
            (self.clock.now_ns() - started_ns) / MILLISECOND, self.wall_ms(),
            tuple(candidates[:SHOWN_CANDIDATES]), len(candidates), dict(detail or {}),
        )  # fmt: skip
        self.history.add(receipt, [*([] if state_id is None else [state_id]), *concerns])
        return receipt

    def seal_block(self, label: Label, payload: bytes) -> bytes:
        """A block's envelope, one checksum per layer where its bytes divide so."""
        return seal(label, payload, self.layers if len(payload) % self.layers == 0 else 1)

    def _may_write(self, place: Place, durable: bool) -> bool:
        """A durable put insists where the tier was only full: its caller waits for the answer."""
        return place.writes.allow() or (durable and place.writes.reason == FULL)

    def _refused(self, reason: str, ended: Callable[[Transfer], None]) -> Transfer:
        transfer = Transfer(0, 0, ended, done=True, reason=reason)
        ended(transfer)
        return transfer

    def _written(self, place: Place, entries: Sequence[Entry], size: int, transfer: Transfer) -> None:
        for entry in entries:
            entry.arriving.discard(place.name)
        if not transfer.ok:
            self.failed(place, place.writes, transfer, [entry.kind for entry in entries])
            for entry in entries:
                self._forget_if_nowhere(entry)
            return
        place.writes.success()
        place.counters.writes += 1
        place.write_speed.observe(size, transfer.ms)
        for entry in entries:
            place.tally.wrote(entry.kind, entry.size_bytes)
            if self.catalog.entries.get(entry.key) is entry:
                place.enter(entry)
            elif not self._is_wanted(place, entry.key):
                self._remove(place, [entry.key], scrub=True)

    def _verified(self, place: Place, labels: Sequence[Label], transfer: Transfer) -> list[bytes | None]:
        kinds = [self._kind_of(label) for label in labels]
        if not transfer.ok:
            self.failed(place, place.reads, transfer, kinds)
            asked = [self.catalog.entries[label.key] for label in labels if label.key in self.catalog.entries]
            place.read_speed.fell_short(sum(entry.size_bytes for entry in asked), transfer.ms)
            return [None] * len(labels)
        place.reads.success()
        place.counters.reads += 1
        payloads: list[bytes | None] = []
        for label, kind, found in zip(labels, kinds, transfer.result):
            place.tally.read(kind, found)
            payloads.append(found if isinstance(found, bytes) else None)
            if isinstance(found, str):
                self._corrupt(place, label)
            elif found is None:
                self._missing(place, label)
        size = sum(len(payload) for payload in payloads if payload is not None)
        place.read_speed.observe(size, transfer.ms)
        return payloads

    def failed(self, place: Place, breaker: CircuitBreaker, transfer: Transfer, kinds: Iterable[str] = ()) -> None:
        """Count it, by the kinds of what was moved, and tell the breaker of what was tried: a full lane is no fault."""
        was_tried = transfer.generation != 0 and not (transfer.reason == BUSY and breaker.state == "closed")
        if not was_tried:
            place.counters.refused += 1
            return
        place.tally.failed(kinds)
        if transfer.is_full:
            breaker.trip(FULL)
        else:
            breaker.failure(transfer.reason)

    def _kind_of(self, label: Label) -> str:
        """A block counts as what owns it, where that is known."""
        entry = self.catalog.entries.get(label.key)
        return label.kind if entry is None else entry.kind

    def _corrupt(self, place: Place, label: Label) -> None:
        """Set aside; the bytes of a home are kept in quarantine and missed from now on."""
        sealed: list[bytes | None] = []

        def job() -> None:
            sealed.extend(place.tier.read([label.key]))
            place.tier.quarantine(label.key, sealed[0])

        deadline = self.settings.write_deadline_ms
        self.mover.start(place.write_lane, job, deadline_ms=deadline, then=lambda _: None)
        self._missing(place, label)

    def _missing(self, place: Place, label: Label) -> None:
        entry = self.catalog.entries.get(label.key)
        if entry is not None:
            place.leave(entry, by_policy=False)
            self._forget_if_nowhere(entry)

    def _is_wanted(self, place: Place, key: bytes) -> bool:
        """Whether these bytes lie there, or are being written, for somebody: also anew, after they were forgotten."""
        entry = self.catalog.entries.get(key)
        return entry is not None and place.name in entry.tiers | entry.arriving

    def _forget_if_nowhere(self, entry: Entry) -> None:
        if not entry.tiers and not entry.arriving and self.catalog.entries.get(entry.key) is entry:
            del self.catalog.entries[entry.key]

    def _remove(self, place: Place, keys: Sequence[bytes], *, scrub: bool, size: int = 0) -> Transfer:
        """Begin to remove; `size` is room that may be planned with at once."""
        place.busy_bytes -= size

        def ended(transfer: Transfer) -> None:
            place.busy_bytes += size
            if not transfer.ok:
                self.failed(place, place.writes, transfer)
                self.debts.owe(place.name, keys)
            elif scrub:
                self.debts.settle(place.name, keys)

        def job() -> None:
            place.tier.drop(keys, scrub=scrub)

        deadline = self.settings.removal_deadline_ms if scrub else self.settings.write_deadline_ms
        return self.mover.start(place.write_lane, job, deadline_ms=deadline, then=ended)


def bare(label: Label) -> Label:
    """A label as the catalog keeps it: without the object's record."""
    return msgspec.structs.replace(label, record=b"")


def opened(sealed: bytes | None, label: Label, *, whole: bool = False) -> bytes | str | None:
    """The payload, or the whole envelope; the reason why these are not its bytes; None where there are none."""
    if sealed is None:
        return None
    try:
        payload = unseal(sealed, label)
        return sealed if whole else payload
    except BadEnvelope as error:
        return error.reason
