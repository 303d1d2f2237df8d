"""A state plane with a second tier that is slow, may fail, and reports late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from nanovllm.engine.block_manager import Lease
from nanovllm.engine.kv_state import Binding, DeviceState, Match, TransferReport
from nanovllm.engine.sequence import Sequence


@dataclass
class Load:
    """How one load will go: it ends at the `delay`-th poll, well or not, with `num_tokens` tokens at most."""

    delay: int = 1
    ok: bool = True
    num_tokens: int = 2**31


@dataclass
class _Transfer:
    seq: Sequence
    generation: int
    lease: Lease
    token_ids: list[int]
    table: list[int]
    start: int
    end: int
    load: Load


class FakeStatePlane:
    """`KVState` around the device's: `plan(seq)` says whether a bind loads the rest of the prefix, and how.

    A transfer writes its bytes when it ends, also where its sequence is long gone: only its lease
    keeps those blocks from belonging to somebody else by then.
    """

    def __init__(
        self,
        device: DeviceState,
        plan: Callable[[Sequence], Load | None],
        write: Callable[[list[int], list[int], int, int], None] = lambda table, token_ids, start, end: None,
    ) -> None:
        self.device, self.manager, self.plan, self.write = device, device.block_manager, plan, write
        self.in_flight: list[_Transfer] = []
        self.num_loads = 0
        self._generations = count(1)

    @property
    def num_blocks(self) -> int:
        return self.device.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.device.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        return self.device.num_cached_blocks

    def match(self, seq: Sequence) -> Match:
        return self.device.match(seq)

    def has_room(self, seq: Sequence, headroom: int) -> bool:
        return self.device.has_room(seq, headroom)

    def bind(self, seq: Sequence) -> Binding:
        self.device.bind(seq)
        size, start = self.manager.block_size, seq.num_cached_tokens
        load = None if seq.skip_external_state else self.plan(seq)
        end = min((seq.num_tokens - 1) // size * size, start + (load.num_tokens // size * size if load else 0))
        if load is None or end <= start:
            return Binding()
        lease = self.manager.acquire(seq.block_table[start // size : end // size], f"load of {seq.request_id}")
        transfer = _Transfer(
            seq, next(self._generations), lease, list(seq.token_ids), list(seq.block_table), start, end, load
        )
        self.in_flight.append(transfer)
        self.num_loads += 1
        return Binding(transfer.generation)

    def grow(self, seq: Sequence) -> bool:
        return self.device.grow(seq)

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        self.device.commit(seq, num_tokens)

    def release(self, seq: Sequence) -> None:
        self.device.release(seq)

    def is_settled(self) -> bool:
        return not self.in_flight

    def poll(self) -> list[TransferReport]:
        for transfer in self.in_flight:
            transfer.load.delay -= 1
        ended = [t for t in self.in_flight if t.load.delay <= 0]
        self.in_flight = [t for t in self.in_flight if t.load.delay > 0]
        return [self._end(transfer) for transfer in ended]

    def _end(self, t: _Transfer) -> TransferReport:
        self.write(t.table, t.token_ids, t.start, t.end)
        self.manager.release(t.lease)
        return TransferReport(t.seq, t.generation, t.load.ok, t.end - t.start if t.load.ok else 0)
