"""TieredState: the engine's verbs over the device and the tiers below it.

What it is: `DeviceState` with a state plane underneath: `bind` may start a load, `poll` moves it on, `commit`
queues blocks to be written behind. What it knows nothing about: tensors, files, HTTP.

Invariants: threads of the tiers read and verify, and only `poll`, on the engine's thread, writes a block of
the pool, so whoever is released has nothing in flight into its blocks; a load ends in one report or, with its
sequence, in none; a load that fails, is late or finds other bytes brings what came before that, and the rest
is computed; a step copies no more than `bytes_per_step` in each direction. Whatever the state plane raises
costs a load or a spill, never a request.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.device_state_tier import DeviceStateTier, store_namespace
from nanovllm.engine.kv_state import Binding, DeviceState, Match, TransferReport
from nanovllm.engine.load_plan import AUTO, NEVER, LoadPlan, ask_ms, blocks_below, count_load, plan_load
from nanovllm.engine.moves import Moves
from nanovllm.engine.prefix_index import Block
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_costs import StepCosts
from nanovllm.engine.write_behind import WriteBehind
from nanovllm.engine.written import RootOf, WrittenCalls
from nanovllm.state.migration import Load
from nanovllm.state.mover import MILLISECOND, Transfer
from nanovllm.state.objects import KVBlock
from nanovllm.state.store import StateStore

logger = logging.getLogger("nanovllm")

BYTES_PER_STEP = 16 << 20


@dataclass
class StateCounters:
    """What happened between the device and the tiers below it, since the start."""

    loads: int = 0
    loaded_tokens: int = 0
    loads_failed: int = 0  # brought less than was found; the rest was computed
    loads_refused: int = 0  # computing was cheaper
    loads_cancelled: int = 0  # the sequence ended first
    errors: int = 0  # exceptions of the state plane, each a load or a spill lost


@dataclass(eq=False)
class PendingLoad:
    """A load under way: `num_done` of the plan's blocks are in the sequence's table, valid."""

    seq: Sequence
    generation: int
    plan: LoadPlan
    first: int
    started_ns: int
    num_done: int = 0
    chunk: Load | None = None
    lookups: list[Transfer] | None = None


class TieredState(DeviceState):
    """The verbs over one `BlockManager` and the store beneath it."""

    def __init__(
        self,
        block_manager: BlockManager,
        device: DeviceStateTier,
        store: StateStore,
        *,
        kv_tiers: tuple[str, ...] = (),
        load_mode: str = AUTO,
        costs: StepCosts | None = None,
        bytes_per_step: int = BYTES_PER_STEP,
        root_of: RootOf | None = None,
    ) -> None:
        super().__init__(block_manager)
        self.device, self.store = device, store
        self.load_mode, self.bytes_per_step = load_mode, bytes_per_step
        self.costs = costs or StepCosts()
        self.counters = StateCounters()
        self.is_active = bool(kv_tiers) and block_manager.prefix_mode == "reuse"
        self.behind = WriteBehind(device, store, kv_tiers, bytes_per_step)
        root = root_of or (lambda name, salt: store.plane.root_of(name))
        self.written = WrittenCalls(store, self.behind, root, self._harmless)
        self.moves = Moves(block_manager.events, store.plane, device.block_bytes)
        self.behind.on_written = self.moves.written
        self._loads: OrderedDict[Sequence, PendingLoad] = OrderedDict()
        self._generation = 0
        self._budget = bytes_per_step
        if self.is_active:
            block_manager.on_evict = self._evicted

    def match(self, seq: Sequence) -> Match:
        """The device first, then the catalog: what lies below is potential until it is loaded."""
        match = super().match(seq)
        if not self.behind.tiers or self.block_manager.prefix_mode == "off":
            return match
        first = match.num_potential_tokens // self.block_manager.block_size
        below = len(blocks_below(self.store.plane, self._blocks(seq, first)))
        potential = match.num_potential_tokens + below * self.block_manager.block_size
        return Match(match.num_hit_tokens, potential, match.num_held_blocks, match.producer)

    def bind(self, seq: Sequence) -> Binding:
        """Allocate; where the following blocks lie below and are worth it, begin to load them."""
        super().bind(seq)
        if not self.is_active or seq.skip_external_state or self.load_mode == NEVER:
            return Binding()
        with self._harmless():
            self._touch(seq)
            load = self._begin(seq)
            if load is not None:
                self._loads[seq] = load
                return Binding(load.generation)
        return Binding()

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Publish and advance; full blocks are queued to be written behind, pins that waited for them hold them."""
        size, before = self.block_manager.block_size, seq.num_cached_tokens
        super().commit(seq, num_tokens)
        first, last = before // size, seq.num_cached_tokens // size
        if last > first and self.block_manager.prefix_mode == "reuse":
            with self._harmless():
                self.store.note_stored(seq.digests[first:last])
                for i in range(first, last) if self.is_active else ():
                    self.behind.add(seq.digests[i], self.costs.ms(i * size, size))

    def release(self, seq: Sequence) -> None:
        """Give everything back; a load under way is forgotten, and what it still brings is dropped."""
        load = self._loads.pop(seq, None)
        self.counters.loads_cancelled += load is not None
        if seq.session_id and seq.is_finished and self.block_manager.prefix_mode == "reuse":
            chain = seq.digests[: seq.num_cached_tokens // self.block_manager.block_size]
            with self._harmless():
                self.store.note_session(seq.session_id, store_namespace(seq.session_owner or seq.namespace), chain)
        super().release(seq)

    def poll(self) -> list[TransferReport]:
        """Move loads on and tell which ended; write behind."""
        self._budget = self.bytes_per_step
        self.tick()
        reports = [self._end(load) for load in list(self._loads.values()) if self._is_over(load)]
        with self._harmless():
            self.behind.write()
            self.written.poll()
        return reports

    def tick(self) -> None:
        """What time brings: transfers that ended, pins and objects that expire."""
        with self._harmless():
            self.store.tick()
            self.moves.watch()

    def rest(self) -> None:
        """Nothing to do: what time brings, and what was learnt is written down now and then."""
        self.tick()
        with self._harmless():
            self.store.rest()

    def is_settled(self) -> bool:
        """False while anything is on its way between tiers, or waits to be written."""
        transfers = self.store.plane.mover.num_pending
        return not self._loads and self.behind.is_empty and self.written.is_empty and transfers == 0

    def close(self) -> None:
        """Write what waits, as far as the tiers take it, and close the store."""
        self._loads.clear()
        self.block_manager.on_evict = None
        with self._harmless():
            self.behind.drain()
            self.written.close()
        self.store.close()
        del self.device.memory  # the pool goes with the engine, whoever still holds its books

    def facts(self) -> dict[str, int]:
        """The counters by name, for metrics and pages."""
        own = {f.name: getattr(self.counters, f.name) for f in fields(StateCounters)}
        return {**own, **self.behind.facts()}

    # -- loads -------------------------------------------------------------------------------------

    def _begin(self, seq: Sequence) -> PendingLoad | None:
        """The load of what lies below, or None where nothing does or computing is cheaper, with its receipt."""
        plane, now = self.store.plane, self.store.plane.clock.now_ns()
        first = seq.num_cached_tokens // self.block_manager.block_size
        blocks = self._blocks(seq, first)
        plan = self._plan(seq, blocks)
        asks = len(plan.blocks) < len(blocks) and any(place.tier.shared for place in plane.places.values())
        lookups = self.store.lookup(blocks[len(plan.blocks) :]) if asks else []
        if not plan.blocks and not lookups:
            return None
        if not plan.is_worth_it and not lookups:
            self.counters.loads_refused += 1
            count_load(plane, plan, 0)
            self._receipt(seq, plan, 0, now, plan.reason)
            self.moves.refused(seq.request_id, plan)
            return None
        self._generation += 1
        return PendingLoad(seq, self._generation, plan, first, now, lookups=lookups or None)

    def _plan(self, seq: Sequence, blocks: list[KVBlock]) -> LoadPlan:
        tiers = blocks_below(self.store.plane, blocks)
        cached, new = seq.num_cached_tokens, seq.num_remaining_tokens
        return plan_load(self.store.plane, blocks, tiers, cached, new, self.costs, self.load_mode)

    def _is_over(self, load: PendingLoad) -> bool:
        """Move one load on, within the step's budget; True where it ended."""
        is_over = True
        with self._harmless():
            is_answered = load.lookups is None or self._is_looked_up(load)
            is_over = is_answered and (self._fetch(load) or self._is_late(load))
        return is_over

    def _is_looked_up(self, load: PendingLoad) -> bool:
        """Whether the shared tiers have answered, or took too long; what is known then is planned."""
        seq = load.seq
        most_ms = ask_ms(seq.num_cached_tokens, seq.num_remaining_tokens, self.costs, self.load_mode)
        if not all(transfer.done for transfer in load.lookups or ()) and self._waited_ms(load) < most_ms:
            return False
        load.lookups = None
        load.plan = self._plan(load.seq, self._blocks(load.seq, load.first))
        return True

    def _fetch(self, load: PendingLoad) -> bool:
        """Read a chunk, write it, read the next; True at the end, or at the first miss."""
        blocks = load.plan.blocks if load.plan.is_worth_it else ()
        while load.num_done < len(blocks):
            if load.chunk is None:
                if self._budget <= 0:
                    return False
                count = max(1, self._budget // self.device.block_bytes)
                load.chunk = self.store.load(blocks[load.num_done : load.num_done + count])
            if not load.chunk.done:
                return False
            chunk, load.chunk = load.chunk, None
            if self._write(load, chunk) < len(chunk.blocks):
                return True
        return True

    def _write(self, load: PendingLoad, chunk: Load) -> int:
        """Verified bytes into the sequence's own, unpublished blocks; how many of the chunk came."""
        for payload in chunk.payloads[: chunk.num_blocks]:
            assert payload is not None
            self.device.memory.write_block(load.seq.block_table[load.first + load.num_done], payload)
            load.num_done += 1
            self._budget -= len(payload)
        return chunk.num_blocks

    def _is_late(self, load: PendingLoad) -> bool:
        return self._waited_ms(load) >= self.store.plane.settings.read_deadline_ms

    def _waited_ms(self, load: PendingLoad) -> float:
        return (self.store.plane.clock.now_ns() - load.started_ns) / MILLISECOND

    def _end(self, load: PendingLoad) -> TransferReport:
        """Take the load off the books; what came is reported, and the receipt says what was expected."""
        self._loads.pop(load.seq, None)
        size, wanted = self.block_manager.block_size, len(load.plan.blocks) if load.plan.is_worth_it else 0
        is_whole = load.num_done == wanted
        if wanted:
            self.counters.loads += 1
            self.counters.loads_failed += not is_whole
            self.counters.loaded_tokens += load.num_done * size
            reason = load.plan.reason if is_whole else f"{wanted - load.num_done} of {wanted} blocks did not come"
            with self._harmless():
                count_load(self.store.plane, load.plan, load.num_done)
                self._receipt(load.seq, load.plan, load.num_done, load.started_ns, reason)
                self.moves.load(load.seq.request_id, load.plan, load.num_done, load.started_ns)
        came = Counter(load.plan.tiers[: load.num_done])
        tokens = {tier: count * size for tier, count in came.items()}
        is_ok = load.num_done > 0 or wanted == 0
        return TransferReport(load.seq, load.generation, is_ok, load.num_done * size, tokens)

    def _receipt(self, seq: Sequence, plan: LoadPlan, num_loaded: int, started_ns: int, reason: str) -> None:
        plane = self.store.plane
        owners = sorted(plane.catalog.owners(plan.blocks[-1].digest))
        came = sum(len(block.token_ids) for block in plan.blocks[:num_loaded]) // self.block_manager.block_size
        plane.receipt(
            "load",
            started_ns,
            num_loaded == len(plan.blocks),
            reason,
            tier=plan.tiers[0],
            size_bytes=came * self.device.block_bytes,
            concerns=owners,
            detail=plan.detail(seq, num_loaded),
        )

    # -- the rest ----------------------------------------------------------------------------------

    def _blocks(self, seq: Sequence, first: int) -> list[KVBlock]:
        """The full blocks from `first` on that a prefix hit may cover: at least one token is always computed."""
        size, index = self.block_manager.block_size, self.block_manager.index
        namespace, blocks = store_namespace(seq.namespace), []
        for i in range(first, (seq.num_tokens - 1) // size):
            digest, parent = index.digest(seq, i), seq.digests[i - 1] if i else None
            blocks.append(KVBlock(digest, parent, tuple(seq.block(i)), namespace))
        return blocks

    def _touch(self, seq: Sequence) -> None:
        """Tell the policies below who was used: a copy of what is hot on the device stays warm."""
        known = [digest for digest in seq.digests if digest in self.store.plane.catalog.entries]
        self.store.touch(known, seq.num_cached_tokens, seq.num_remaining_tokens, hit=True)

    def _evicted(self, block: Block) -> None:
        with self._harmless():
            self.behind.evicted(block)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """An exception of the state plane is counted and logged; the request goes on without it."""
        try:
            yield
        except Exception:
            self.counters.errors += 1
            if self.counters.errors <= 3:
                logger.exception("The state plane failed; serving goes on without it.")
