"""WriteBehind: full blocks on their way from the device to the tiers below it.

What it is: a queue of digests, from which each step copies a bounded number of bytes out of the pool. What it
knows nothing about: sequences, when blocks are computed. Invariants: the queue is bounded, and what does not
fit is dropped and counted: losing a copy costs time, never an answer; no more than MAX_WRITES writes are
under way, so a slow tier holds up no memory; a block that a tier has, or gets, is not copied again.
"""

from __future__ import annotations

from collections import OrderedDict

from nanovllm.engine.device_state_tier import DeviceStateTier
from nanovllm.engine.prefix_index import Block
from nanovllm.state.mover import Transfer
from nanovllm.state.objects import KVBlock
from nanovllm.state.store import StateStore

MAX_QUEUED = 65_536
MAX_WRITES = 4
BATCH_BYTES = 4 << 20


class WriteBehind:
    """The queue of one engine. `tiers`: where blocks are copied to, each of them."""

    def __init__(self, device: DeviceStateTier, store: StateStore, tiers: tuple[str, ...], bytes_per_step: int) -> None:
        self.tiers = tiers
        self.written_blocks = self.dropped_blocks = 0
        self._device, self._store, self._bytes_per_step = device, store, bytes_per_step
        self._queue: OrderedDict[bytes, float] = OrderedDict()  # digest -> what computing it cost, ms
        self._writes: list[Transfer] = []
        self._eviction_budget = bytes_per_step

    @property
    def is_empty(self) -> bool:
        """Nothing waits, and nothing is being written."""
        return not self._queue and not self._under_way()

    def add(self, digest: bytes, cost_ms: float) -> None:
        """A block became findable."""
        if len(self._queue) >= MAX_QUEUED:
            self.dropped_blocks += 1
        elif self._missing(digest):
            self._queue[digest] = cost_ms

    def write(self) -> None:
        """Copy some blocks out and begin to write them; called once a step."""
        self._eviction_budget = budget = self._bytes_per_step
        size = self._device.block_bytes
        while self._queue and budget > 0 and len(self._under_way()) < MAX_WRITES:
            count = max(1, min(BATCH_BYTES, budget) // size)
            batch = [self._queue.popitem(last=False) for _ in range(min(count, len(self._queue)))]
            budget -= size * len(batch)
            self._spill([block for digest, cost in batch if (block := self._block(digest, cost)) is not None])

    def evicted(self, block: Block) -> None:
        """A block is about to be overwritten: the last moment to copy it, where no tier has it."""
        digest = block.hash_value or b""
        cost_ms = self._queue.pop(digest, 0.0)
        entry = self._store.plane.catalog.entries.get(digest)
        if entry is not None and (entry.tiers or entry.arriving):
            return
        described = self._device.describe(block, cost_ms)
        if described is None or self._eviction_budget <= 0 or len(self._under_way()) >= MAX_WRITES:
            self.dropped_blocks += 1
            return
        self._eviction_budget -= self._device.block_bytes
        self._spill([described])

    def drain(self) -> None:
        """Write all that waits; the tiers' deadlines bound that."""
        while self._queue:
            self.write()
            self._store.settle()
        self._store.settle()

    def facts(self) -> dict[str, int]:
        """For metrics and pages."""
        return {
            "spilled_blocks": self.written_blocks,
            "spills_dropped": self.dropped_blocks,
            "spills_waiting": len(self._queue),
        }

    def _under_way(self) -> list[Transfer]:
        self._writes = [transfer for transfer in self._writes if not transfer.done]
        return self._writes

    def _missing(self, digest: bytes) -> list[str]:
        """The tiers that lack this block and take writes."""
        plane = self._store.plane
        entry = plane.catalog.entries.get(digest)
        have = set() if entry is None else entry.tiers | entry.arriving
        return [name for name in self.tiers if name not in have and plane.places[name].writes.state != "open"]

    def _block(self, digest: bytes, cost_ms: float) -> KVBlock | None:
        """The block as it can be found now; None where it was evicted meanwhile, or every tier has it."""
        holder = self._device.manager.index.holder_of(digest)
        return self._device.describe(holder, cost_ms) if holder is not None and self._missing(digest) else None

    def _spill(self, blocks: list[KVBlock]) -> None:
        pairs = [(block, data) for block in blocks if (data := self._device.read(block.digest)) is not None]
        for name in self.tiers:
            wanted = [pair for pair in pairs if name in self._missing(pair[0].digest)]
            transfer = self._store.spill(wanted, name) if wanted else None
            if transfer is None:
                self.dropped_blocks += len(wanted)
                continue
            self.written_blocks += len(wanted)
            self._writes.append(transfer)
