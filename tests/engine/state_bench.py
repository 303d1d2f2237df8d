"""An engine with tiers beneath it and no tensors: the KV of a block is a proof of its whole prefix, as bytes."""

from __future__ import annotations

import queue
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from nanovllm.core.clock import VirtualClock
from nanovllm.core.digest import root_digest
from nanovllm.engine.device_state_tier import DeviceStateTier, engine_namespace
from nanovllm.engine.kv_state import DeviceState
from nanovllm.engine.tiered_state import TieredState
from nanovllm.errors import TierError
from nanovllm.state.mover import Job, Report, run_job
from nanovllm.state.settings import StateSettings
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.host import HostTier
from nanovllm.state.tiers.tier import Found
from tests.engine.helpers import Bench, ShadowRunner, make_bench

SIZE = 4
IDENTITY = {"weights": "shadow"}


class ShadowMemory:
    """The slots of a `ShadowRunner` as bytes: token and state of each position. An unwritten one is zeros."""

    def __init__(self, runner: ShadowRunner) -> None:
        self.runner = runner
        self.block_bytes = 16 * SIZE

    def read_block(self, block_id: int) -> bytes:
        return b"".join(struct.pack("<qq", *self.runner.slots.get((block_id, i), (0, 0))) for i in range(SIZE))

    def write_block(self, block_id: int, data: bytes) -> None:
        assert len(data) == self.block_bytes
        for i in range(SIZE):
            self.runner.slots[block_id, i] = struct.unpack_from("<qq", data, 16 * i)


class FaultyTier(HostTier):
    """A second tier below the first, which fails, lies and loses what it is told to."""

    name = "cellar"

    def __init__(self, quota_bytes: int = 1 << 20) -> None:
        super().__init__(quota_bytes)
        self.is_failing = False
        self.flip: int | None = None  # which bit of everything that is read

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self.is_failing:
            raise TierError("The cellar is flooded.")
        found = super().read(keys)
        return found if self.flip is None else [sealed and flipped(sealed, self.flip) for sealed in found]

    def write(self, items: Any) -> None:
        if self.is_failing:
            raise TierError("The cellar is flooded.")
        super().write(items)

    def scan(self) -> Iterator[Found]:
        return iter(())


class HandLane:
    """Runs jobs when it is told to: a tier as slow as the test wants."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._jobs: list[tuple[int, Job, queue.SimpleQueue[Report]]] = []
        self.is_open = True

    def submit(self, generation: int, job: Job, reports: queue.SimpleQueue[Report]) -> bool:
        self._jobs.append((generation, job, reports))
        if self.is_open:
            self.run()
        return True

    def run(self) -> None:
        jobs, self._jobs = self._jobs, []
        for generation, job, reports in jobs:
            reports.put(run_job(self._clock, generation, job))

    def close(self) -> None:
        self.run()


class StateBench:
    """A bench, its state and its faulty tier."""

    def __init__(self, *, kv_tiers: tuple[str, ...] = ("cellar",), load_mode: str = "always", **knobs: Any) -> None:
        self.clock = VirtualClock()
        self.cellar = FaultyTier()
        self.tiers = [HostTier(1 << 16), self.cellar]
        self.kv_tiers, self.load_mode = kv_tiers, load_mode
        self.bench: Bench = make_bench(
            clock=self.clock, kv=self._state, vocab_size=251, block_size=SIZE, **{"num_blocks": 16, **knobs}
        )
        self.engine, self.manager = self.bench.engine, self.bench.manager
        place = self.store.plane.places["cellar"]
        self.lane = HandLane(self.clock)
        place.read_lane = self.lane

    def _state(self, device: DeviceState, runner: ShadowRunner) -> TieredState:
        manager = device.block_manager
        pool = DeviceStateTier(manager, ShadowMemory(runner), "shadow", 1)
        self.store = StateStore(
            self.tiers,
            device=pool,
            settings=StateSettings(read_deadline_ms=50),
            root_of=lambda name: root_digest({**IDENTITY, "namespace": engine_namespace(name), "salt": ""}),
            clock=self.clock,
            wall_ms=lambda: self.clock.now_ns() // 1_000_000,
            threads=False,
        )
        self.state = TieredState(
            manager, pool, self.store, kv_tiers=self.kv_tiers, load_mode=self.load_mode, bytes_per_step=4 * 16 * SIZE
        )
        return self.state

    def run(self, prompt: list[int], params: Any, request_id: str | None = None) -> Any:
        """One request to its end, alone."""
        request_id = self.engine.add_request(prompt, params, request_id=request_id)
        return self.bench.drain()[request_id]

    def write_all(self) -> None:
        """Idle steps until nothing waits to be written."""
        for _ in range(100):
            if self.state.is_settled():
                return
            self.bench.step()
        raise AssertionError("still writing")

    def forget_device(self) -> None:
        """Nothing of the device can be found any more; the tiers below keep what they have."""
        for digest in list(self.manager.hash_to_block_id):
            assert self.state.device.discard(digest)


def flipped(sealed: bytes, bit: int) -> bytes:
    at = bit % (8 * len(sealed))
    return sealed[: at // 8] + bytes([sealed[at // 8] ^ (1 << at % 8)]) + sealed[at // 8 + 1 :]
