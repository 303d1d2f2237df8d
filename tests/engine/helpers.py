"""Engines made of plain parts: no torch, a virtual clock, and a runner that proves where KV lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovllm.core.clock import VirtualClock
from nanovllm.core.cost_table import CostTable
from nanovllm.core.digest import DigestFn, block_digest
from nanovllm.core.events import TERMINAL_STAGES, EventBus, RequestEvent
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.exec_batch import ExecBatch, ExecResult, Runner
from nanovllm.engine.intake import Intake
from nanovllm.engine.integrity import check_blocks
from nanovllm.engine.kv_state import DeviceState, KVState
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import StepOutput
from nanovllm.engine.parts import EngineParts
from nanovllm.engine.policy import RANKINGS, SchedulingPolicy
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.simulated_runner import SimulatedRunner
from nanovllm.errors import NanoVLLMError
from nanovllm.models.byte_tokenizer import ByteTokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
COSTS = CostTable(base_ms=1.0, per_new_ms=0.1, per_pair_ms=0.001)
ROOT = 17


class Injected(Exception):
    """What tests raise where they want something to fail. Any other exception that the engine survives is a defect."""


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": True, **more})


def stub_digest(bits: int) -> DigestFn:
    """A digest so short that it collides all the time."""
    return lambda parent, token_ids: bytes([block_digest(parent, token_ids)[0] & ((1 << bits) - 1)])


def next_state(state: int, token_id: int) -> int:
    """What the KV of a token depends on: the token and everything before it."""
    return hash((state, token_id))


def state_of(token_ids: Sequence[int]) -> int:
    state = ROOT
    for token_id in token_ids:
        state = next_state(state, token_id)
    return state


def answer(prompt: Sequence[int], max_tokens: int, vocab_size: int, eos: Sequence[int] = ()) -> list[int]:
    """What `ShadowRunner` must generate for `prompt`, whatever else happens."""
    state, out = state_of(prompt), []
    while len(out) < max_tokens:
        out.append(state % vocab_size)
        state = next_state(state, out[-1])
        if out[-1] in eos:
            break
    return out


class ShadowRunner:
    """A model whose token is a hash of its whole context, read through the block tables.

    Each slot remembers (token, state after it). A wrong table, a stale or poisoned hit, KV that
    was lost or not computed yet, and two writers of one slot all end in an AssertionError or in
    other tokens than `answer` gives.
    """

    def __init__(self, block_size: int, vocab_size: int = 16) -> None:
        self.block_size, self.vocab_size = block_size, vocab_size
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.num_computed = 0
        self.fail_next: BaseException | None = None
        self.before: Callable[[ExecBatch], None] = lambda batch: None

    def launch(self, batch: ExecBatch) -> ExecResult:
        self.before(batch)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        written: dict[tuple[int, int], tuple[int, int]] = {}
        ends, last_states = np.cumsum(batch.query_lens), []
        for row, (end, query, context) in enumerate(zip(ends, batch.query_lens, batch.context_lens, strict=True)):
            table = batch.block_tables[row].tolist()
            tokens = batch.token_ids[end - query : end].tolist()
            last_states.append(self._row(table, tokens, int(context - query), written))
        self.slots |= written
        self.num_computed += int(batch.query_lens.sum())
        tokens = [s % self.vocab_size for s, wanted in zip(last_states, batch.samples, strict=True) if wanted]
        return ExecResult(np.array(tokens, np.int64), [None] * len(tokens))

    def collect(self, handle: object) -> ExecResult:
        assert isinstance(handle, ExecResult)
        return handle

    def write(self, table: Sequence[int], token_ids: Sequence[int], start: int, end: int) -> None:
        """Put right KV into slots, as a load of state does."""
        for position in range(start, end):
            self.slots[self._slot(table, position)] = (token_ids[position], state_of(token_ids[: position + 1]))

    def _row(self, table: list[int], tokens: list[int], start: int, written: dict[Any, Any]) -> int:
        state = ROOT
        for position in range(start):
            token_id, kept = self.slots[self._slot(table, position)]
            state = next_state(state, token_id)
            assert kept == state, f"position {position} holds KV of another prefix"
        for offset, token_id in enumerate(tokens):
            state, slot = next_state(state, token_id), self._slot(table, start + offset)
            assert slot not in written, "two rows write one slot"
            written[slot] = (token_id, state)
        return state

    def _slot(self, table: Sequence[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size


@dataclass
class Bench:
    """An engine under test, and what hangs on to it."""

    engine: LLMEngine
    manager: BlockManager
    clock: VirtualClock
    runner: Any

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    def step(self) -> list[StepOutput]:
        """One step, with every invariant checked behind it."""
        outputs = self.engine.step()
        check_blocks(self.manager, self.scheduler.live())
        self._check_failures([self.engine.health.last_failure, *(out.final.error for out in outputs if out.final)])
        return outputs

    def _check_failures(self, failures: list[NanoVLLMError | None]) -> None:
        for failure in failures:
            cause = failure and failure.__cause__
            if cause is not None and not isinstance(cause, Injected):
                raise cause

    def drain(self, limit: int = 2000) -> dict[str, Any]:
        """Step until nothing is live; the finished requests by id."""
        finals = self.drain_but(None, limit)
        assert not self.manager.used_block_ids and not self.manager.leases
        return finals

    def drain_but(self, pin: object, limit: int = 2000) -> dict[str, Any]:
        """The same where `pin` keeps its blocks."""
        finals: dict[str, Any] = {}
        for _ in range(limit):
            if self.engine.is_finished():
                assert self.manager.leases <= {pin}
                return finals
            finals |= {out.request_id: out.final for out in self.step() if out.final}
        raise AssertionError(f"not drained in {limit} steps")

    def events(self) -> list[RequestEvent]:
        kept = self.engine.events.reader(from_start=True).poll()
        return [event for event in kept if isinstance(event, RequestEvent)]

    def terminals(self, request_id: str) -> list[str]:
        return [e.stage for e in self.events() if e.request_id == request_id and e.stage in TERMINAL_STAGES]


def make_bench(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    prefix_mode: str = "reuse",
    digest_fn: DigestFn = block_digest,
    runner: Runner | None = None,
    simulated: bool = False,
    clock: VirtualClock | None = None,
    kv: Callable[[DeviceState, Any], KVState] | None = None,
    vocab_size: int = 16,
    eos: tuple[int, ...] = (),
    max_model_len: int | None = None,
    watermark_blocks: int = 0,
    policy: str = "fcfs",
    event_capacity: int = 1 << 20,
    tokenizer: Any = None,
    **knobs: Any,
) -> Bench:
    """`knobs` are those of `SchedulingPolicy`; `kv` wraps the device's state, and sees the runner."""
    clock = clock or VirtualClock()
    events = EventBus(clock, event_capacity)
    manager = BlockManager(num_blocks, block_size, prefix_mode, digest_fn=digest_fn, events=events)
    if runner is None:
        runner = SimulatedRunner(COSTS, clock, vocab_size) if simulated else ShadowRunner(block_size, vocab_size)
    state: KVState = DeviceState(manager) if kv is None else kv(DeviceState(manager), runner)
    scheduler = Scheduler(
        SchedulingPolicy(RANKINGS[policy], **knobs),
        state,
        clock,
        events,
        block_size=block_size,
        watermark_blocks=watermark_blocks,
    )
    tokenizer = tokenizer or ByteTokenizer()
    limit = max_model_len or num_blocks * block_size
    engine = LLMEngine(
        EngineParts(
            runner=runner,
            scheduler=scheduler,
            intake=Intake(tokenizer, max(vocab_size, tokenizer.vocab_size), limit),
            tokenizer=tokenizer,
            clock=clock,
            events=events,
            eos_token_ids=eos,
            identity={"weights": "shadow"},
            label="simulated",
        )
    )
    return Bench(engine, manager, clock, runner)
