"""A recording, read back: the header and the events of one run.

What it is: the strict reader of what `recording_writer.py` writes. What it knows nothing
about: what the events add up to. Invariants: it believes nothing: a line that is no
record, out of order or too long ends the reading with its number and a reason; it reads
at most `max_bytes`; a recording that is incomplete says so in `remarks`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from nanovllm.core.events import BlockEvent, Event, RequestEvent, StepEvent, WaitEvent
from nanovllm.errors import RecordingError
from nanovllm.observe.records import RunEnd, RunHeader, from_record, header_from

MAX_BYTES = 2**30
MAX_LINE_BYTES = 2**16


@dataclass
class Recording:
    """One run: its `events`, and the same by kind, all in the order of their sequence numbers."""

    header: RunHeader
    events: list[Event] = field(default_factory=list)
    requests: list[RequestEvent] = field(default_factory=list)
    steps: list[StepEvent] = field(default_factory=list)
    waits: list[WaitEvent] = field(default_factory=list)
    blocks: list[BlockEvent] = field(default_factory=list)
    end: RunEnd | None = None

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.events.append(event)
        if isinstance(event, RequestEvent):
            self.requests.append(event)
        elif isinstance(event, StepEvent):
            self.steps.append(event)
        elif isinstance(event, WaitEvent):
            self.waits.append(event)
        else:
            self.blocks.append(event)

    @property
    def label(self) -> str:
        """Of every time in it: `measured` or `simulated`."""
        return self.header.label

    @property
    def start_ns(self) -> int:
        """The first moment that is told."""
        return min(self._moments(), default=0)

    @property
    def end_ns(self) -> int:
        """The last moment that is told."""
        return max(self._moments(), default=0)

    def _moments(self) -> list[int]:
        return [event.ts_ns for event in self.requests] + [step.ts_ns for step in self.steps]

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before believing it."""
        if self.end is None:
            return ["The recording has no last line: the run was cut off, or still goes on."]
        lost = self.end.dropped + self.end.omitted
        return [f"{lost:,} events are missing: figures over them are too low."] if lost else []


def read_recording(path: Path, *, max_bytes: int = MAX_BYTES) -> Recording:
    """The run in `path`. Raises RecordingError."""
    try:
        with path.open("rb") as file:
            lines = _lines(file, path, max_bytes)
            first = next(lines, None)
            if first is None:
                raise RecordingError(f"{path} is empty.", param="file")
            recording = Recording(_parsed(path, 1, first, header_from))
            for number, line in enumerate(lines, 2):
                _take(recording, path, number, line)
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror or error}.", param="file") from error
    return recording


def _take(recording: Recording, path: Path, number: int, line: bytes) -> None:
    if recording.end is not None:
        raise _refused(path, number, "something follows the record that ends the recording")
    found = _parsed(path, number, line, from_record)
    if isinstance(found, RunEnd):
        recording.end = found
        return
    if recording.events and found.seq <= recording.events[-1].seq:
        raise _refused(path, number, f"seq {found.seq} does not follow the one before it")
    recording.add(found)


def _lines(file: BinaryIO, path: Path, max_bytes: int) -> Iterator[bytes]:
    """Whole lines, each with its end."""
    number = read = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number, read = number + 1, read + len(line)
        if read > max_bytes:
            raise _refused(path, number, f"the file is longer than {max_bytes:,} bytes")
        if not line.endswith(b"\n"):
            what = "the line is too long" if len(line) > MAX_LINE_BYTES else "the line is cut off"
            raise _refused(path, number, what)
        yield line


def _parsed(path: Path, number: int, line: bytes, parse: Any) -> Any:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("this is no JSON object")
        return parse(record)
    except (ValueError, RecursionError) as error:
        reason = "this is no JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
        raise _refused(path, number, reason) from error


def _refused(path: Path, number: int, reason: str) -> RecordingError:
    return RecordingError(f"{path}, line {number}: {reason}.", param="file")
