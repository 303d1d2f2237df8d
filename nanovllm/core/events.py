"""Events: what happened, as typed records on a bounded bus.

What it is: the one stream that logs, traces, dashboards and labs read. What it
knows nothing about: its readers. Invariants: sequence numbers have no gaps on the
bus; a reader that falls behind is told how many records it lost; emitting never
blocks and never fails. Counters and timelines are kept elsewhere and synchronously:
nothing exact is derived from a stream that may drop. No event carries prompt text.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import NamedTuple

from nanovllm.core.clock import Clock

SCHEMA = 1
STAGES = (
    "entered",
    "queued",
    "scheduled",
    "loading",
    "prefill_begin",
    "prefill_chunk",
    "prefill_end",
    "first_token",
    "first_handover",
    "decode_step",
    "output_complete",
    "state_released",
    "preempted",
    "aborted",
    "failed",
    "rejected",
)
TERMINAL_STAGES = ("output_complete", "aborted", "failed", "rejected")
WAIT_REASONS = (
    "blocks",
    "headroom",
    "batch_cap",
    "token_budget",
    "new_requests_cap",
    "policy",
    "producer",
    "preempted",
)
MOVES = ("load", "write", "failure")
OUTCOMES = ("done", "partial", "failed", "refused", "closed", "half_open", "open")
BLOCK_CALLS = ("can_allocate", "allocate", "deallocate", "hash_blocks")


class RequestEvent(NamedTuple):
    """One request reached a stage. `epoch` counts its preemptions; `batch_size` is the step's, 0 outside one.

    `tokens`: what a prefill chunk computed. `sample`: which of the request's n samples this is.
    """

    seq: int
    ts_ns: int
    request_id: str
    stage: str
    epoch: int
    prompt_len: int
    generated_len: int
    batch_size: int
    tokens: int = 0
    sample: int = 0


class StepEvent(NamedTuple):
    """One engine step is launched: who runs, who waits, how many blocks are free, and of those still matchable.

    `scheduled_ns`: when its scheduling call began. `block_ns`: nanoseconds in each of BLOCK_CALLS since the
    step before, where that is measured.
    """

    seq: int
    ts_ns: int
    step: int
    batch_size: int
    running_size: int
    waiting_size: int
    prefill_tokens: int
    decode_tokens: int
    free_blocks: int
    cached_blocks: int = 0
    scheduled_ns: int = 0
    block_ns: tuple[int, ...] | None = None


class WaitEvent(NamedTuple):
    """Why a request does not run: from now until its next event, or until another wait is told.

    Told of the head of the line, for which everybody behind it waits too, of a follower (`producer`) and of
    a victim (`preempted`); `behind` is whose blocks it waits for or was preempted for. With `blocks` it needs more
    blocks than are free; with `headroom` they would do, but for what is kept free beside them.
    """

    seq: int
    ts_ns: int
    request_id: str
    reason: str
    need_blocks: int
    headroom: int
    free_blocks: int
    behind: str


class BlockEvent(NamedTuple):
    """A full block became shareable (`stored`) or ceased to be (`removed`), on `medium`."""

    seq: int
    ts_ns: int
    action: str
    digest: bytes
    parent: bytes
    block_size: int
    medium: str
    token_ids: tuple[int, ...] | None


class MoveEvent(NamedTuple):
    """KV moved between the device and a lower tier, or could not: it is told when that ended.

    `load`: of a request's prefix (`done`, `partial`, `failed`; `refused`: computing was cheaper). `write`: behind the
    device, so many blocks in one go (`done`, `failed`). `failure`: the tier failed at something; the outcome is the
    state of its breaker since then. `blocks` and `size_bytes` are what arrived. `kinds`: of state, sorted, `+` between
    them: a load or a write in one go may be of several.
    """

    seq: int
    ts_ns: int
    move: str
    tier: str
    request_id: str
    blocks: int
    size_bytes: int
    duration_ns: int
    outcome: str
    kinds: str = ""


Event = RequestEvent | StepEvent | WaitEvent | BlockEvent | MoveEvent


class EventBus:
    """A ring of the last `capacity` events; writers append, each reader keeps its own place."""

    def __init__(self, clock: Clock, capacity: int = 65536) -> None:
        self._clock = clock
        self._ring: deque[Event] = deque(maxlen=capacity)
        self._next_seq = 0
        self.dropped = 0  # events that its readers were too slow to see, all readers together

    @property
    def emitted(self) -> int:
        """How many events were emitted so far; the next one gets this sequence number."""
        return self._next_seq

    def request(
        self,
        request_id: str,
        stage: str,
        epoch: int,
        prompt_len: int,
        generated_len: int,
        batch_size: int = 0,
        ts_ns: int | None = None,
        tokens: int = 0,
        sample: int = 0,
    ) -> None:
        """Emit a `RequestEvent`, at `ts_ns` where the moment was taken already."""
        ts_ns = self._clock.now_ns() if ts_ns is None else ts_ns
        lengths = (prompt_len, generated_len)
        self._append(
            RequestEvent(self._next_seq, ts_ns, request_id, stage, epoch, *lengths, batch_size, tokens, sample)
        )

    def step(
        self,
        step: int,
        batch_size: int,
        running_size: int,
        waiting_size: int,
        prefill_tokens: int,
        decode_tokens: int,
        free_blocks: int,
        cached_blocks: int = 0,
        scheduled_ns: int = 0,
        ts_ns: int | None = None,
        block_ns: tuple[int, ...] | None = None,
    ) -> None:
        """Emit a `StepEvent`, at `ts_ns` where the moment was taken already."""
        ts_ns = self._clock.now_ns() if ts_ns is None else ts_ns
        sizes = (batch_size, running_size, waiting_size, prefill_tokens, decode_tokens, free_blocks, cached_blocks)
        self._append(StepEvent(self._next_seq, ts_ns, step, *sizes, scheduled_ns, block_ns))

    def wait(
        self, request_id: str, reason: str, need_blocks: int, headroom: int, free_blocks: int, behind: str = ""
    ) -> None:
        """Emit a `WaitEvent`."""
        told = (request_id, reason, need_blocks, headroom, free_blocks, behind)
        self._append(WaitEvent(self._next_seq, self._clock.now_ns(), *told))

    def block(
        self,
        action: str,
        digest: bytes,
        parent: bytes,
        block_size: int,
        medium: str = "device",
        token_ids: tuple[int, ...] | None = None,
    ) -> None:
        """Emit a `BlockEvent`."""
        self._append(
            BlockEvent(self._next_seq, self._clock.now_ns(), action, digest, parent, block_size, medium, token_ids)
        )

    def move(
        self,
        move: str,
        tier: str,
        outcome: str,
        *,
        request_id: str = "",
        blocks: int = 0,
        size_bytes: int = 0,
        duration_ns: int = 0,
        kinds: str = "",
    ) -> None:
        """Emit a `MoveEvent`."""
        told = (move, tier, request_id, blocks, size_bytes, duration_ns, outcome, kinds)
        self._append(MoveEvent(self._next_seq, self._clock.now_ns(), *told))

    def reader(self, *, from_start: bool = False) -> EventReader:
        """A reader that starts at the present, or at the oldest event still kept."""
        start = self._next_seq - len(self._ring) if from_start else self._next_seq
        return EventReader(self, start)

    def since(self, seq: int) -> list[Event]:
        """The kept events with a sequence number of at least `seq`, in order."""
        count = min(self._next_seq - seq, len(self._ring))
        newest_first = list(islice(reversed(self._ring), max(count, 0)))
        return newest_first[::-1]

    @property
    def oldest(self) -> int:
        """Sequence number of the oldest event kept."""
        return self._next_seq - len(self._ring)

    def _append(self, event: Event) -> None:
        self._ring.append(event)
        self._next_seq += 1


class EventReader:
    """One reader's place in the stream. `dropped` counts what it was too slow to see."""

    def __init__(self, bus: EventBus, start: int) -> None:
        self._bus, self._next, self.dropped = bus, start, 0

    def poll(self) -> list[Event]:
        """Everything new since the last call."""
        missed = max(self._bus.oldest - self._next, 0)
        self.dropped += missed
        self._bus.dropped += missed
        events = self._bus.since(self._next)
        self._next = self._bus.emitted
        return events
