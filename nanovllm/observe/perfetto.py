"""A recorded run as Chrome Trace Event JSON, which ui.perfetto.dev and chrome://tracing open.

What it is: requests as asynchronous slices per stage, steps as slices of one thread, the
block pool and the queue as counters. What it knows nothing about: files, statistics.
Invariants: times are microseconds from the run's first moment; each begin has its end;
every slice carries the run's label and the numbers of its records.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanovllm.observe.paths import Replay, RequestPath, Step

STEPS, POOL = 1, 2  # process ids: tracks


def chrome_trace(run: Replay) -> dict[str, Any]:
    """The whole run as one JSON document."""
    events = [*_names(), *_steps(run), *_counters(run)]
    for number, path in enumerate(run.paths.values(), 1):
        events += _request(run, number, path)
    told = {**run.recording.header.__dict__, "remarks": " ".join(run.recording.remarks)}
    return {
        "displayTimeUnit": "ms",
        "otherData": {name: str(value) for name, value in told.items()},
        "traceEvents": events,
    }


def stage_spans(path: RequestPath) -> list[tuple[str, int, int]]:
    """(term, start, end) of a path, in order: the terms that make up its life, without their sub-terms."""
    t = path.timeline
    first = t.token_ns[0] if t.token_ns else None
    last = t.token_ns[-1] if t.token_ns else None
    marks = [
        ("T_queue", t.arrival_ns, t.scheduled_ns),
        ("T_schedule", t.scheduled_ns, t.launch_ns),
        ("T_prefill", t.launch_ns, first),
        ("T_return", first, t.first_handover_ns),
        ("decode", t.first_handover_ns, last if len(t.token_ns) > 1 else None),
        ("T_stream", last if len(t.token_ns) > 1 else None, t.last_handover_ns),
    ]
    return [(name, start, end) for name, start, end in marks if start is not None and end is not None and end >= start]


def _names() -> list[dict[str, Any]]:
    names = {STEPS: "engine steps", POOL: "block pool and queue"}
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}} for pid, name in names.items()
    ]


def _request(run: Replay, number: int, path: RequestPath) -> Iterator[dict[str, Any]]:
    """One asynchronous track: the request, its terms inside it, its preempted spans inside these."""
    common = {"cat": "request", "pid": STEPS, "tid": 0, "id": f"r{number}"}
    last_ns = max([event.ts_ns for event in path.events] + [path.timeline.arrival_ns])
    told = {"prompt_len": path.prompt_len, "generated_len": path.generated_len, "end": path.end or "unfinished"}
    waits = [("preempted", span.start_ns, span.end_ns) for span in path.waits if span.stage == "preempted"]
    spans = [(path.name, path.timeline.arrival_ns, last_ns), *stage_spans(path), *waits]
    for index, (name, start_ns, end_ns) in enumerate(spans):
        args = {"label": run.recording.label, "records": [event.seq for event in path.events][:100]} | told
        yield {**common, "ph": "b", "name": name, "ts": _us(run, start_ns), "args": args if index == 0 else {}}
        yield {**common, "ph": "e", "name": name, "ts": _us(run, end_ns)}


def _steps(run: Replay) -> Iterator[dict[str, Any]]:
    for step in run.steps:
        yield {
            "ph": "X",
            "cat": "step",
            "name": _kind(step),
            "pid": STEPS,
            "tid": 1,
            "ts": _us(run, step.start_ns),
            "dur": (step.end_ns - step.start_ns) / 1000,
            "args": {
                "label": run.recording.label,
                "step": step.event.step,
                "record": step.event.seq,
                "prefill_tokens": step.event.prefill_tokens,
                "decode_tokens": step.event.decode_tokens,
                "requests": list(step.members),
            },
        }


def _kind(step: Step) -> str:
    prefill, decode = step.event.prefill_tokens > 0, step.event.decode_tokens > 0
    return "prefill + decode" if prefill and decode else "prefill" if prefill else "decode"


def _counters(run: Replay) -> Iterator[dict[str, Any]]:
    num_blocks = run.recording.header.num_blocks
    for step in run.steps:
        event, at_us = step.event, _us(run, step.start_ns)
        blocks = {
            "used": num_blocks - event.free_blocks,
            "cached": event.cached_blocks,
            "free": event.free_blocks - event.cached_blocks,
        }
        yield {"ph": "C", "name": "blocks", "pid": POOL, "tid": 0, "ts": at_us, "args": blocks}
        queue = {"waiting": event.waiting_size, "running": event.running_size}
        yield {"ph": "C", "name": "requests", "pid": POOL, "tid": 0, "ts": at_us, "args": queue}


def _us(run: Replay, at_ns: int) -> float:
    return (at_ns - run.recording.start_ns) / 1000
