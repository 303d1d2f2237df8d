"""WriteBehind: full blocks on their way from the device to the tiers below it.

What it is: a queue of digests per tier, from which each step copies a bounded number of bytes out of the pool.
What it knows nothing about: sequences, when blocks are computed. Invariants: a queue is bounded, and what does
not fit is dropped and counted: losing a copy costs time, never an answer; no more than MAX_WRITES writes of a tier
are under way, so a slow tier holds up no memory, and no other tier; a block that a tier has, or gets, is not copied
to it again; what was dropped while it waits, or while somebody still runs on it, is not copied any more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nanovllm.core.digest import Digest
from nanovllm.engine.device_state_tier import DeviceStateTier
from nanovllm.engine.prefix_index import Block
from nanovllm.state.mover import Transfer
from nanovllm.state.objects import KVBlock
from nanovllm.state.place import Place
from nanovllm.state.steps import after
from nanovllm.state.store import StateStore

MAX_QUEUED = 65_536
MAX_WRITES = 4
BATCH_BYTES = 4 << 20


@dataclass
class Backlog:
    """What one tier still lacks: digests with what computing them cost, ms, and the writes under way."""

    place: Place
    waiting: OrderedDict[bytes, float] = field(default_factory=OrderedDict)
    writes: list[Transfer] = field(default_factory=list)

    @property
    def is_busy(self) -> bool:
        """No further write may begin."""
        self.writes = [transfer for transfer in self.writes if not transfer.done]
        return len(self.writes) >= MAX_WRITES

    @property
    def takes_writes(self) -> bool:
        """False while the tier is left alone."""
        return self.place.writes.state != "open"


class WriteBehind:
    """The queues of one engine. `tiers`: where blocks are copied to, each of them."""

    def __init__(self, device: DeviceStateTier, store: StateStore, tiers: tuple[str, ...], bytes_per_step: int) -> None:
        self.tiers = tiers
        self.written_blocks = self.dropped_blocks = 0
        self.on_written: Callable[[str, list[Digest], Transfer], None] = lambda tier, digests, transfer: None
        self._device, self._store = device, store
        self._backlogs = {name: Backlog(store.plane.places[name]) for name in tiers}
        self._budget = self._eviction_budget = bytes_per_step

    @property
    def is_empty(self) -> bool:
        """Nothing waits, and nothing is being written."""
        return not any(backlog.waiting or self._under_way(backlog) for backlog in self._backlogs.values())

    def add(self, digest: bytes, cost_ms: float) -> None:
        """A block became findable."""
        for backlog in self._backlogs.values():
            if self._lacks(backlog, digest):
                self.dropped_blocks += len(backlog.waiting) >= MAX_QUEUED
                if len(backlog.waiting) < MAX_QUEUED:
                    backlog.waiting[digest] = cost_ms

    def hurry(self, digests: Iterable[bytes]) -> None:
        """These go first, in this order: somebody waits for them."""
        for digest in reversed(list(digests)):
            for backlog in self._backlogs.values():
                if digest in backlog.waiting:
                    backlog.waiting.move_to_end(digest, last=False)

    def is_on_its_way(self, digest: bytes, tier: str) -> bool:
        """Whether the block waits to be written to that tier, or is being written."""
        entry = self._store.plane.catalog.entries.get(digest)
        return digest in self._backlogs[tier].waiting or (entry is not None and tier in entry.arriving)

    def write(self) -> None:
        """Copy some blocks out and begin to write them; called once a step."""
        self._eviction_budget = self._budget
        for backlog in self._backlogs.values():
            self._write(backlog, self._budget // len(self._backlogs))

    def evicted(self, block: Block) -> None:
        """A block is about to be overwritten: the last moment to copy it, where no tier has it."""
        digest = block.hash_value or b""
        costs = [backlog.waiting.pop(digest, 0.0) for backlog in self._backlogs.values()]
        entry = self._store.plane.catalog.entries.get(digest)
        if (entry is not None and (entry.tiers or entry.arriving)) or self._store.plane.is_condemned(digest):
            return
        described = self._device.describe(block, max(costs, default=0.0))
        backlogs = [each for each in self._backlogs.values() if not each.is_busy and self._lacks(each, digest)]
        if described is None or self._eviction_budget <= 0 or not backlogs:
            self.dropped_blocks += 1
            return
        self._eviction_budget -= self._device.block_bytes
        for backlog in backlogs:
            self._spill(backlog, [described])

    def drain(self) -> None:
        """Write all that waits; the tiers' deadlines bound that."""
        while any(backlog.waiting for backlog in self._backlogs.values()):
            self.write()
            self._store.settle()
        self._store.settle()

    def facts(self) -> dict[str, int]:
        """For metrics and pages. A block that goes to two tiers counts twice."""
        return {
            "spilled_blocks": self.written_blocks,
            "spills_dropped": self.dropped_blocks,
            "spills_waiting": sum(len(backlog.waiting) for backlog in self._backlogs.values()),
        }

    def _under_way(self, backlog: Backlog) -> bool:
        return any(not transfer.done for transfer in backlog.writes)

    def _lacks(self, backlog: Backlog, digest: bytes) -> bool:
        """Whether the tier has not got this block, gets it not, takes writes, and may have it: it was not dropped."""
        plane = self._store.plane
        entry = plane.catalog.entries.get(digest)
        has = entry is not None and backlog.place.name in entry.tiers | entry.arriving
        return not has and backlog.takes_writes and not plane.is_condemned(digest)

    def _write(self, backlog: Backlog, budget: int) -> None:
        size = self._device.block_bytes
        while backlog.waiting and budget > 0 and not backlog.is_busy:
            count = max(1, min(BATCH_BYTES, budget) // size)
            batch = [backlog.waiting.popitem(last=False) for _ in range(min(count, len(backlog.waiting)))]
            budget -= size * len(batch)
            self._spill(backlog, [found for digest, cost in batch if (found := self._found(backlog, digest, cost))])

    def _found(self, backlog: Backlog, digest: bytes, cost_ms: float) -> KVBlock | None:
        """The block as it can be found now; None where it was evicted meanwhile, or the tier has it."""
        holder = self._device.manager.index.holder_of(digest)
        return self._device.describe(holder, cost_ms) if holder is not None and self._lacks(backlog, digest) else None

    def _spill(self, backlog: Backlog, blocks: list[KVBlock]) -> None:
        pairs = [(block, data) for block in blocks if (data := self._device.read(block.digest)) is not None]
        transfer = self._store.spill(pairs, backlog.place.name) if pairs else None
        if transfer is None:
            self.dropped_blocks += len(pairs)
            return
        self.written_blocks += len(pairs)
        backlog.writes.append(transfer)
        digests = [block.digest for block, _ in pairs]
        after(transfer, lambda: self.on_written(backlog.place.name, digests, transfer))
