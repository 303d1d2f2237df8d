"""Board: the picture a dashboard draws, as plain data, whole or as what changed.

What it is: the engine's last view in the words of the page. What it knows nothing about:
viewers, HTTP, who may look. Invariants: a snapshot followed by each later increment is the
snapshot of that moment; it holds one view, the last ENDED requests, the last EVENTS
events and the last RECEIPTS receipts; no text of a prompt or an answer is in it.

    snapshot    engine, ts_ms, stats, num_requests, requests, cached, held, ended, events, events_lost, receipts
    increment           ts_ms, stats, num_requests, and of the others what is new:
                requests (each whole, but block_ids only where they changed), gone, cached and held as {add, drop}
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from nanovllm.engine.messages import EngineInfo, Finished, RequestView, StateView, Timings

ENDED, EVENTS, RECEIPTS = 64, 200, 40
TERMS = ("queue", "intake", "state", "schedule", "prefill", "return")
Shown = dict[str, Any]


class Board:
    """One engine's picture. `ended` is told at any time, views while somebody looks."""

    def __init__(self) -> None:
        self._view: StateView | None = None
        self._cached: set[int] = set()
        self._held: set[int] = set()
        self._waits: dict[str, list[tuple[int, int | None]]] = {}
        self._ended: deque[Shown] = deque(maxlen=ENDED)
        self._new: deque[Shown] = deque(maxlen=ENDED)  # of those, what no increment has told
        self._events: deque[Shown] = deque(maxlen=EVENTS)
        self._receipts: deque[Shown] = deque(maxlen=RECEIPTS)
        self._lost = 0

    @property
    def is_empty(self) -> bool:
        """True before the first view."""
        return self._view is None

    def forget(self) -> None:
        """The view is no longer true: nobody looked meanwhile, or the engine is another one."""
        self._view = None
        self._events.clear()
        self._receipts.clear()
        self._waits.clear()
        self._lost = 0

    def ended(self, finished: Finished) -> None:
        """A request has ended. One that never entered has no times to show."""
        if finished.timings is not None:
            shown = _ended(finished, finished.timings, self._waits.pop(finished.request_id, []))
            self._ended.append(shown)
            self._new.append(shown)

    def take(self, view: StateView) -> Shown:
        """The next view; returns the increment."""
        before = {} if self._view is None else {one.request_id: one for one in self._view.requests}
        cached, held = set(view.cached_ids), set(view.held_ids)
        ended, events = list(self._new), view.events[-EVENTS:]
        increment = {
            "type": "increment",
            **_moment(view),
            "requests": [_live(one, before.get(one.request_id)) for one in view.requests],
            "gone": sorted(before.keys() - {one.request_id for one in view.requests}),
            "cached": _change(self._cached, cached),
            "held": _change(self._held, held),
            "ended": ended,
            "events": events,
            "events_lost": view.events_lost,
            "receipts": view.receipts,
        }
        self._view, self._cached, self._held = view, cached, held
        self._waits = {one.request_id: one.waits for one in view.requests if one.waits}
        self._new.clear()
        self._events.extend(events)
        self._receipts.extend(view.receipts)
        self._lost += view.events_lost
        return increment

    def snapshot(self, info: EngineInfo, model: str) -> Shown:
        """Everything, as of the last view; `model` is its name for clients. Not to be asked of an empty board."""
        view = self._view
        assert view is not None
        return {
            "type": "snapshot",
            "engine": msgspec.to_builtins(info) | {"model": model},
            **_moment(view),
            "requests": [_live(one, None) for one in view.requests],
            "cached": sorted(self._cached),
            "held": sorted(self._held),
            "ended": list(self._ended),
            "events": list(self._events),
            "events_lost": self._lost,
            "receipts": list(self._receipts),
        }


def _moment(view: StateView) -> Shown:
    stats = msgspec.to_builtins(view.stats) | {"cached_blocks": len(view.cached_ids)}
    return {"ts_ms": _ms(view.ts_ns), "stats": stats, "num_requests": view.num_requests}


def _live(one: RequestView, before: RequestView | None) -> Shown:
    """One request; its blocks only where they are not what they were."""
    shown = {
        "id": one.request_id,
        "stage": one.stage,
        "arrival_ms": _ms(one.arrival_ns),
        "samples": one.samples,
        "prompt_tokens": one.prompt_tokens,
        "computed_tokens": one.computed_tokens,
        "output_tokens": one.output_tokens,
        "cached_tokens": one.cached_tokens,
        "terms": _terms(one.timings),
        "waits": _waits(one.waits),
    }
    return shown if before is not None and before.block_ids == one.block_ids else {**shown, "block_ids": one.block_ids}


def _ended(finished: Finished, timings: Timings, waits: list[tuple[int, int | None]]) -> Shown:
    return {
        "id": finished.request_id,
        "reason": "error" if finished.error is not None else (finished.finish_reasons or ["abort"])[0],
        "arrival_ms": _ms(timings.arrival_ns),
        "end_to_end_ms": _ms(timings.end_to_end_ns),
        "prompt_tokens": finished.prompt_tokens,
        "output_tokens": finished.completion_tokens,
        "cached_tokens": finished.cached_tokens,
        "terms": _terms(timings),
        "waits": _waits(waits),
    }


def _terms(timings: Timings | None) -> dict[str, float | None]:
    """The terms of docs/design.md, milliseconds by name without their T_, and `ttft`, their sum."""
    if timings is None:
        return {}
    return {"ttft": _ms(timings.ttft_ns)} | {name: _ms(getattr(timings, f"t_{name}_ns")) for name in TERMS}


def _waits(waits: list[tuple[int, int | None]]) -> list[list[float | None]]:
    return [[_ms(since_ns), _ms(until_ns)] for since_ns, until_ns in waits]


def _change(before: set[int], after: set[int]) -> dict[str, list[int]]:
    return {"add": sorted(after - before), "drop": sorted(before - after)}


def _ms(ns: int | None) -> float | None:
    return None if ns is None else round(ns / 1e6, 3)
