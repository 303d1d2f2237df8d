"""Lifecycle logs: the event stream as the lines a person or a program reads.

What it is: readers of the event bus. `LifecycleLog` prints one of three line formats
live; `JsonlWriter` keeps the request events as records. What it knows nothing about:
the engine, tensors, who asked for the log. Invariants: a line or record holds no
prompt text; a reader that was too slow says how much it lost; a file stays within
its bound and always ends with a whole record.

    stage   request_id prompt_len stage
    state   batch_size running_size
    bench   [timestamp] request_id stage prompt_len generated_len batch_size
            [timestamp] batch_state batch_size running_size waiting_size prefill_tokens decode_tokens free_blocks

Timestamps are seconds of the engine's clock, to the microsecond.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TextIO
from urllib.parse import quote

from nanovllm.core.events import SCHEMA, Event, EventBus, EventReader, RequestEvent, StepEvent
from nanovllm.errors import ConfigError

FORMATS = ("stage", "state", "bench")
DEFAULT_MAX_BYTES = 256 * 2**20


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


class JsonlWriter:
    """Writes each request event as one JSON record, flushed at every `pump`, up to `max_bytes`.

    `dropped` counts events the bus had forgotten, `omitted` records beyond the bound.
    """

    def __init__(self, bus: EventBus, path: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Replaces the file. Raises ConfigError where it cannot be written."""
        self._reader: EventReader = bus.reader()
        self._left_bytes, self.omitted = max_bytes, 0
        try:
            self._file = path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise ConfigError(f"The event log {path} cannot be written: {error.strerror}.", param="events") from error

    @property
    def dropped(self) -> int:
        """Events that were lost before they could be read."""
        return self._reader.dropped

    def pump(self) -> None:
        """Write what is new and flush it."""
        for event in self._reader.poll():
            if isinstance(event, RequestEvent):
                self._write(json.dumps(record(event), separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write what is left and close the file. Safe to repeat."""
        if not self._file.closed:
            self.pump()
            self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: str) -> None:
        if len(line) > self._left_bytes:  # json.dumps escapes: one character is one byte
            self._left_bytes = 0  # nor a shorter one later: what is kept has no holes
            self.omitted += 1
            return
        self._file.write(line)
        self._left_bytes -= len(line)


def record(event: RequestEvent) -> dict[str, int | str]:
    """One request event as the JSONL record, with its schema's number."""
    return {
        "schema": SCHEMA,
        "seq": event.seq,
        "ts_ns": event.ts_ns,
        "request_id": event.request_id,
        "stage": event.stage,
        "epoch": event.epoch,
        "prompt_len": event.prompt_len,
        "generated_len": event.generated_len,
        "batch_size": event.batch_size,
    }


def _seconds(ts_ns: int) -> str:
    """Seconds with six decimals, by integer arithmetic: no rounding moves an event."""
    return f"{ts_ns // 10**9}.{ts_ns % 10**9 // 1000:06d}"


def _one_word(request_id: str) -> str:
    """The id as one field: callers choose ids, so spaces and control characters are percent-encoded."""
    is_plain = request_id.isprintable() and " " not in request_id and request_id
    return request_id if is_plain else quote(request_id, safe="") or "-"
