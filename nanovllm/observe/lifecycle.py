"""Lifecycle logs: the event stream as the lines a person or a program reads.

What it is: a reader of the event bus. `LifecycleLog` prints one of three line formats
live; records for programs are `recording_writer.py`'s. What it knows nothing about: the
engine, tensors, who asked for the log. Invariants: a line holds no prompt text; a reader
that was too slow says how much it lost.

    stage   request_id prompt_len stage
    state   batch_size running_size
    bench   [timestamp] request_id stage prompt_len generated_len batch_size
            [timestamp] batch_state batch_size running_size waiting_size prefill_tokens decode_tokens free_blocks

Timestamps are seconds of the engine's clock, to the microsecond.
"""

from __future__ import annotations

from typing import TextIO
from urllib.parse import quote

from nanovllm.core.events import Event, EventBus, RequestEvent, StepEvent
from nanovllm.errors import ConfigError

FORMATS = ("stage", "state", "bench")


def stage_line(event: Event) -> str | None:
    """`request_id prompt_len stage`, of request events."""
    if not isinstance(event, RequestEvent):
        return None
    return f"{_one_word(event.request_id)} {event.prompt_len} {event.stage}"


def state_line(event: Event) -> str | None:
    """`batch_size running_size`, of step events."""
    return f"{event.batch_size} {event.running_size}" if isinstance(event, StepEvent) else None


def bench_line(event: Event) -> str | None:
    """Request events and step events, each with its moment."""
    if isinstance(event, RequestEvent):
        name = _one_word(event.request_id)
        rest = f"{event.stage} {event.prompt_len} {event.generated_len} {event.batch_size}"
    elif isinstance(event, StepEvent):
        name = "batch_state"
        rest = (
            f"{event.batch_size} {event.running_size} {event.waiting_size} "
            f"{event.prefill_tokens} {event.decode_tokens} {event.free_blocks}"
        )
    else:
        return None
    return f"[{_seconds(event.ts_ns)}] {name} {rest}"


_LINES = {"stage": stage_line, "state": state_line, "bench": bench_line}


class LifecycleLog:
    """Prints what is new on the bus in one format. Call `pump` as often as the log is to be live."""

    def __init__(self, bus: EventBus, line_format: str, out: TextIO) -> None:
        """Raises ConfigError for a format other than stage, state or bench."""
        if line_format not in _LINES:
            raise ConfigError(f"log must be one of {', '.join(FORMATS)}, not {line_format!r}.", param="log")
        self._reader, self._line, self._out = bus.reader(), _LINES[line_format], out
        self._told_dropped = 0

    def pump(self) -> None:
        """Print a line for each new event the format has a line for."""
        lines = [line for line in map(self._line, self._reader.poll()) if line is not None]
        if self._reader.dropped > self._told_dropped:
            lines.insert(0, f"# {self._reader.dropped - self._told_dropped} events lost")
            self._told_dropped = self._reader.dropped
        if lines:
            self._out.write("\n".join(lines) + "\n")
            self._out.flush()


def _seconds(ts_ns: int) -> str:
    """Seconds with six decimals, by integer arithmetic: no rounding moves an event."""
    return f"{ts_ns // 10**9}.{ts_ns % 10**9 // 1000:06d}"


def _one_word(request_id: str) -> str:
    """The id as one field: callers choose ids, so spaces and control characters are percent-encoded."""
    is_plain = request_id.isprintable() and " " not in request_id and request_id
    return request_id if is_plain else quote(request_id, safe="") or "-"
