"""Migration: spill, load, lookup, migrate. Bytes change their place and stay what they are.

What it is: the movements between tiers, for the engine (begin, and be told) and for the verb `migrate`
(wait). What it knows nothing about: when to move. Invariants: what moves is a copy until it has arrived;
bytes are charged with the milliseconds they took; a load gives verified bytes up to its first miss, and
the rest is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanovllm.errors import InvalidRequestError
from nanovllm.state.catalog import Entry
from nanovllm.state.envelope import Label, pack_tokens, sealed_size
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.mover import InlineLane, Transfer
from nanovllm.state.objects import KVBlock, StateObject
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane, bare
from nanovllm.state.receipts import Receipt
from nanovllm.state.reclaim import Reclaim
from nanovllm.state.steps import Steps

BATCH = 32  # blocks that a verb moves at a time


@dataclass(eq=False)
class Load:
    """Blocks on their way up. `payloads[i]` is None until it came, and stays None where it was a miss."""

    blocks: Sequence[KVBlock]
    payloads: list[bytes | None]
    waiting: int = 0
    then: Callable[[Load], None] = field(default=lambda load: None)
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every tier has answered, or its deadline is over."""
        return self.waiting == 0

    @property
    def num_blocks(self) -> int:
        """Blocks from the first on that came; the first miss ends what can be used."""
        return next((i for i, payload in enumerate(self.payloads) if payload is None), len(self.payloads))


@dataclass
class Migration:
    """The movements."""

    plane: Plane
    reclaim: Reclaim

    def spill(
        self, pairs: Sequence[tuple[KVBlock, bytes]], tier: str | None = None, *, durable: bool = False
    ) -> Transfer | None:
        """Begin to write computed blocks to a tier, the fastest by default; None where there is no room for them."""
        place = self._place(tier) if tier is not None else next(iter(self.plane.places.values()), None)
        if place is None:
            return None
        known = self.plane.catalog.entries
        new = [
            self._sealed(block, data)
            for block, data in pairs
            if block.digest not in known or place.name not in known[block.digest].tiers | known[block.digest].arriving
        ]
        size = sum(len(sealed) for _, sealed in new)
        if not new or self.reclaim.make_room(place, size, new[0][0].namespace) is None:
            return None
        return self.plane.write(
            place, [(known.get(entry.key, entry), sealed) for entry, sealed in new], durable=durable
        )

    def load(self, blocks: Sequence[KVBlock], then: Callable[[Load], None] = lambda load: None) -> Load:
        """Begin to read blocks, each from the fastest tier that has it."""
        load = Load(blocks, [None] * len(blocks), then=then)
        by_place: dict[str, list[int]] = {}
        for i, block in enumerate(blocks):
            name = self._source(block.digest)
            if name is None:
                break  # nothing behind a hole can be used
            by_place.setdefault(name, []).append(i)
        load.waiting = len(by_place)
        for name, numbers in by_place.items():
            labels = [self.label_of(blocks[i]) for i in numbers]
            load.transfers.append(self.plane.read(self.plane.places[name], labels, self._arrival(load, numbers)))
        if not by_place:
            then(load)
        return load

    def fetch(self, blocks: Sequence[KVBlock]) -> Steps[Load]:
        """Read blocks, as a part of a verb."""
        load = self.load(blocks)
        yield from load.transfers
        return load

    def lookup(self, blocks: Sequence[KVBlock]) -> list[Transfer]:
        """Ask the tiers that others write to, too, for blocks that nobody here has; what is found can be matched."""
        missing = [block for block in blocks if self._source(block.digest) is None]
        shared = [place for place in self.plane.places.values() if place.tier.shared]
        return [self._ask(place, missing) for place in shared if missing and place.reads.allow()]

    def demote(self, place: Place, entry: Entry) -> str | None:
        """A victim's bytes to the next tier down, where they are worth it; None where they are not moved."""
        if entry.home is not None or not isinstance(place.read_lane, InlineLane):
            return None
        names = list(self.plane.places)
        for lower in (self.plane.places[name] for name in names[names.index(place.name) + 1 :]):
            if lower.name in entry.tiers | entry.arriving:
                return None
            value = KIND_TABLE[entry.kind].value_ms(entry, lower.read_speed.ms(entry.size_bytes))
            if lower.writes.state == "closed" and (value is None or value > 0):
                return self._copy(place, entry, lower)
        return None

    def migrate(self, obj: StateObject, tier: str, pinned: bool = False) -> Steps[Receipt]:
        """The verb: the object's bytes to that tier, copies above it given up. Refused where there is no room."""
        started = self.plane.clock.now_ns()
        place = self._place(tier)
        missing = [entry for entry in self.plane.catalog.entries_of(obj) if place.name not in entry.tiers]
        size = sum(entry.size_bytes for entry in missing)
        refusal = self._refusal(place, missing, size, obj)
        if refusal:
            return self.plane.receipt("migrate", started, False, refusal, obj=obj, tier=tier)
        moved = yield from self._bring(missing, place)
        ok = moved == size
        if ok and not pinned:
            self._give_up_above(obj, place)
        have = sum(place.name in entry.tiers for entry in self.plane.catalog.entries_of(obj))
        reason = f"{have} pieces are in {tier}" if ok else f"{size - moved:,} of {size:,} bytes could not be moved"
        return self.plane.receipt("migrate", started, ok, reason, obj=obj, tier=tier, size_bytes=moved)

    def label_of(self, block: KVBlock) -> Label:
        """The label under which a block is stored here."""
        return Label(
            key=block.digest,
            kind="kv",
            namespace=block.namespace,
            layout=self.plane.layout,
            parent=block.parent or b"",
            tokens=pack_tokens(block.token_ids),
            cost_ms=block.cost_ms,
        )

    def _sealed(self, block: KVBlock, data: bytes) -> tuple[Entry, bytes]:
        label = self.label_of(block)
        sealed = self.plane.seal_block(label, data)
        return Entry(bare(label), self.plane.catalog.kind_of(block.digest), len(sealed), len(block.token_ids)), sealed

    def _source(self, digest: bytes) -> str | None:
        """The fastest tier to read it from; one that is left alone is none."""
        entry = self.plane.catalog.entries.get(digest)
        if entry is None:
            return None
        return next((name for name, place in self.plane.places.items() if place.can_give(entry)), None)

    def _arrival(self, load: Load, numbers: Sequence[int]) -> Callable[[Transfer], None]:
        def arrived(transfer: Transfer) -> None:
            for i, payload in zip(numbers, transfer.result):
                load.payloads[i] = payload
            load.waiting -= 1
            if load.done:
                load.then(load)

        return arrived

    def _ask(self, place: Place, blocks: Sequence[KVBlock]) -> Transfer:
        keys = [block.digest for block in blocks]

        def answered(transfer: Transfer) -> None:
            if not transfer.ok:
                self.plane.failed(place, place.reads, transfer, ["kv"])
                return
            if place.reads.state != "closed":  # who answers quickly what it has may yet fail every read
                place.reads.success()
            for block, is_there in zip(blocks, transfer.result):
                if is_there:
                    self._enter_found(place, block)

        deadline = self.plane.settings.read_deadline_ms
        return self.plane.mover.start(
            place.read_lane, lambda: place.tier.contains(keys), deadline_ms=deadline, then=answered
        )

    def _enter_found(self, place: Place, block: KVBlock) -> None:
        label = self.label_of(block)
        size = sealed_size(label, 0 if self.plane.device is None else self.plane.device.block_bytes, self.plane.layers)
        entry = Entry(bare(label), self.plane.catalog.kind_of(block.digest), size, len(block.token_ids))
        place.enter(self.plane.catalog.entries.setdefault(block.digest, entry))

    def _copy(self, place: Place, entry: Entry, lower: Place) -> str | None:
        sealed = place.tier.read([entry.key])[0]
        if sealed is None or self.reclaim.make_room(lower, len(sealed), entry.namespace) is None:
            return None
        transfer = self.plane.write(lower, [(entry, sealed)])
        return None if transfer.done and not transfer.ok else lower.name

    def _place(self, tier: str) -> Place:
        if tier not in self.plane.places:
            raise InvalidRequestError(
                f"There is no tier {tier!r:.60} to move to.",
                param="tier",
                hint=f"There are {', '.join(self.plane.places)}.",
            )
        return self.plane.places[tier]

    def _refusal(self, place: Place, missing: Sequence[Entry], size: int, obj: StateObject) -> str:
        if not any(True for _ in self.plane.catalog.entries_of(obj)):
            return "none of its bytes lie in a tier below the device yet"
        if missing and self.reclaim.make_room(place, size, obj.namespace) is None:
            return f"{size:,} bytes do not fit {place.name}: what is there is held"
        return ""

    def _bring(self, missing: Sequence[Entry], place: Place) -> Steps[int]:
        """Sealed bytes, as they are, from the fastest tier that has them; what does not verify is not spread."""
        moved, left = 0, list(missing)
        for source in [each for each in self.plane.places.values() if each is not place]:
            there = [entry for entry in left if source.name in entry.tiers]
            for start in range(0, len(there), BATCH):
                batch = there[start : start + BATCH]
                read = self.plane.read(source, [entry.label for entry in batch], sealed=True)
                yield read
                known = self.plane.catalog.entries  # without what was dropped while it was read
                found = [(entry, sealed) for entry, sealed in zip(batch, read.result) if sealed is not None]
                pairs = [(entry, sealed) for entry, sealed in found if known.get(entry.key) is entry]
                if pairs:
                    write = self.plane.write(place, pairs)
                    yield write
                    moved += sum(entry.size_bytes for entry, _ in pairs) if write.ok else 0
            left = [entry for entry in left if place.name not in entry.tiers]
        return moved

    def _give_up_above(self, obj: StateObject, place: Place) -> None:
        for name in list(self.plane.places)[: list(self.plane.places).index(place.name)]:
            above = self.plane.places[name]
            for entry in list(self.plane.catalog.entries_of(obj))[::-1]:
                if name in entry.tiers and not above.victims.is_held(entry.key):
                    self.plane.evict(above, entry)
            self.plane.flush(above)
