"""StateWatch: what an engine holds at this moment, said a few times a second while somebody looks.

What it is: the one picture of the live requests, their blocks and the newest events that a
dashboard is drawn from. What it knows nothing about: who looks, HTTP. Invariants: it changes
nothing; nothing in a view is shared with the engine; while nobody looks it costs a comparison
a turn; what it says of one moment is bounded by the live requests, the pool and MAX_EVENTS.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from nanovllm.core.events import Event, EventReader, MoveEvent, RequestEvent, WaitEvent
from nanovllm.core.timeline import Timeline
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import EngineStats, RequestView, StateView, Submit, terms_of
from nanovllm.engine.sequence import Sequence
from nanovllm.observe.records import to_record

MAX_EVENTS = 200  # of one view, the newest
RECENT_EVENTS = 4096  # how far back the first view looks for them
MAX_REQUESTS = 512
MAX_RECEIPTS = 20  # of one view, the newest
MAX_WAITS = 8  # of one request, the newest
SHOWN_OF_A_RECEIPT = ("seq", "action", "ok", "reason", "state_id", "tier", "size_bytes", "ms", "ts_ms")
_TOO_MANY = ("decode_step",)  # one a token: the picture shows their sum


class StateWatch:
    """Makes views of one engine when they are due."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._period_s = 0.0
        self._said_s = 0.0
        self._reader: EventReader | None = None
        self._seen = -1  # how many events there were at the last view
        self._receipt = 0  # the number of the newest receipt that was told

    @property
    def is_on(self) -> bool:
        """Whether somebody looks."""
        return self._reader is not None

    def set(self, period_s: float) -> None:
        """A view every so often from now on, beginning with the recent past; 0 for none."""
        bus = self._engine.events
        self._period_s, self._seen, self._receipt = period_s, -1, 0
        self._reader = EventReader(bus, max(bus.oldest, bus.emitted - RECENT_EVENTS)) if period_s else None

    def due_in_s(self, idle_s: float) -> float:
        """How long the loop may sleep: until the next view where there is news, else `idle_s`."""
        if self._reader is None or self._seen == self._engine.events.emitted:
            return idle_s
        return min(idle_s, max(0.0, self._said_s + self._period_s - time.monotonic()))

    def is_due(self) -> bool:
        """Whether a view is to be made now."""
        return self._reader is not None and time.monotonic() - self._said_s >= self._period_s

    def view(self, stats: EngineStats, intake: Iterable[Submit]) -> StateView:
        """This moment. `intake`: requests that have not entered the engine yet, their grammar being compiled."""
        engine, scheduler = self._engine, self._engine.scheduler
        self._said_s, self._seen = time.monotonic(), engine.events.emitted
        events, lost = self._news()
        live = [_request_view(engine.book.sequences(name), scheduler.loading) for name in engine.book.request_ids]
        now_ns = engine.clock.now_ns()
        requests = [*filter(None, live), *(_not_yet_in(submit, now_ns) for submit in intake)]
        manager: BlockManager | None = getattr(scheduler.kv, "block_manager", None)
        return StateView(
            now_ns,
            stats,
            requests[:MAX_REQUESTS],
            num_requests=len(requests),
            cached_ids=[] if manager is None else manager.free_block_ids.cached_ids(),
            held_ids=[] if manager is None else sorted({i for lease in manager.leases for i in lease.block_ids}),
            events=events,
            events_lost=lost,
            receipts=self._receipts(),
        )

    def _news(self) -> tuple[list[dict[str, Any]], int]:
        """The newest events since the last view as records, and how many before them are not shown."""
        if self._reader is None:
            return [], 0
        dropped = self._reader.dropped
        events = [event for event in self._reader.poll() if _is_shown(event)]
        lost = self._reader.dropped - dropped + max(0, len(events) - MAX_EVENTS)
        return [to_record(event) for event in events[-MAX_EVENTS:]], lost

    def _receipts(self) -> list[dict[str, Any]]:
        """The newest receipts of the state plane since the last view, oldest first, without their candidates."""
        if self._engine.parts.state is None:
            return []
        new: list[dict[str, Any]] = []
        for receipt in reversed(self._engine.parts.state.store.plane.history.recent):
            if receipt.seq <= self._receipt or len(new) >= MAX_RECEIPTS:
                break
            new.append({name: getattr(receipt, name) for name in SHOWN_OF_A_RECEIPT})
        if new:
            self._receipt = new[0]["seq"]
        return new[::-1]


def _is_shown(event: Event) -> bool:
    if isinstance(event, MoveEvent):
        return event.move != "write" or event.outcome == "failed"  # of writes there is one a step
    return isinstance(event, WaitEvent) or (isinstance(event, RequestEvent) and event.stage not in _TOO_MANY)


def _not_yet_in(submit: Submit, now_ns: int) -> RequestView:
    arrival_ns = now_ns if submit.arrival_ns is None else submit.arrival_ns
    return RequestView(submit.request_id, "intake", arrival_ns, prompt_tokens=len(submit.token_ids))


def _request_view(seqs: list[Sequence], loading: Iterable[Sequence]) -> RequestView | None:
    """A request by its samples that live; its stage and its terms are the first one's. None where none lives."""
    if not seqs:
        return None
    first = seqs[0]
    return RequestView(
        first.request_id,
        _stage(first, loading),
        first.timeline.arrival_ns,
        samples=len(seqs),
        prompt_tokens=first.num_prompt_tokens,
        computed_tokens=first.num_cached_tokens,
        output_tokens=sum(seq.num_completion_tokens for seq in seqs),
        cached_tokens=first.num_hit_tokens,
        timings=terms_of(first.timeline),
        waits=_waits(first.timeline),
        block_ids=[block_id for seq in seqs for block_id in seq.block_table],
    )


def _stage(seq: Sequence, loading: Iterable[Sequence]) -> str:
    if seq in loading:
        return "loading"
    if not seq.block_table:
        return "preempted" if seq.num_preemptions else "queued"
    return "prefill" if seq.is_prefilling else "decode"


def _waits(timeline: Timeline) -> list[tuple[int, int | None]]:
    """From each preemption to the first run after it, None while that has not come."""
    resumed: dict[int, int] = {}
    for run in timeline.prefill_runs:
        resumed.setdefault(run.epoch, run.start_ns)
    waits = [(since_ns, resumed.get(epoch)) for epoch, since_ns in enumerate(timeline.preempted_ns, 1)]
    return waits[-MAX_WAITS:]
