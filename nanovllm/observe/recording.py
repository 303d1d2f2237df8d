"""A recording, read back: the header and the events of one run.

What it is: the strict reader of what `recording_writer.py` writes. What it knows nothing
about: what the events add up to. Invariants: it believes nothing: a line that is no
record, out of order or too long ends the reading with its number and a reason, and so does a
count of generated tokens that its own records cannot bear out; it reads at most `max_bytes`;
a recording that is incomplete says so in `remarks`, and one that ends within a line is read up to it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from nanovllm.core.events import BlockEvent, Event, MoveEvent, RequestEvent, StepEvent, WaitEvent
from nanovllm.errors import RecordingError
from nanovllm.observe.records import RunEnd, RunHeader, from_record, header_from

MAX_BYTES = 2**30
MAX_LINE_BYTES = 2**16
TOKEN_STAGES = ("first_token", "decode_step")


@dataclass
class Recording:
    """One run: its `events`, and the same by kind, all in the order of their sequence numbers."""

    header: RunHeader
    events: list[Event] = field(default_factory=list)
    requests: list[RequestEvent] = field(default_factory=list)
    steps: list[StepEvent] = field(default_factory=list)
    waits: list[WaitEvent] = field(default_factory=list)
    blocks: list[BlockEvent] = field(default_factory=list)
    moves: list[MoveEvent] = field(default_factory=list)
    end: RunEnd | None = None
    cut_line: int | None = None  # the number of the last line, where it has no end

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.events.append(event)
        if isinstance(event, RequestEvent):
            self.requests.append(event)
        elif isinstance(event, StepEvent):
            self.steps.append(event)
        elif isinstance(event, WaitEvent):
            self.waits.append(event)
        elif isinstance(event, MoveEvent):
            self.moves.append(event)
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
        if self.cut_line is not None:
            return [
                f"The recording was cut off within its line {self.cut_line}: that line and what followed are missing."
            ]
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
            if not first.endswith(b"\n"):
                raise _refused(path, 1, "the line is cut off")
            recording, claims = Recording(_parsed(path, 1, first, header_from)), _Claims()
            for number, line in enumerate(lines, 2):
                if line.endswith(b"\n"):
                    _take(recording, path, number, line)
                    claims.check(recording, number)
                else:
                    recording.cut_line = number
            claims.settle(recording, path)
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


class _Claims:
    """What request events claim to be generated, beside the events that each tell of one token."""

    def __init__(self) -> None:
        self._told = Counter[tuple[str, int]]()
        self._most, self._line, self._what = 0, 0, ""
        self._checked = 0

    def check(self, recording: Recording, number: int) -> None:
        """Look at the event that line `number` added, if it is a request's."""
        for event in recording.requests[self._checked :]:
            key = (event.request_id, event.sample)
            self._told[key] += event.stage in TOKEN_STAGES
            if event.generated_len - self._told[key] > self._most:
                self._most, self._line = event.generated_len - self._told[key], number
                self._what = f"generated_len {event.generated_len}, but the records so far tell of {self._told[key]}"
        self._checked = len(recording.requests)

    def settle(self, recording: Recording, path: Path) -> None:
        """Refuse a claim that not even all the events that are missing could bear out."""
        end, events = recording.end, recording.events
        unnumbered = events[-1].seq + 1 - len(events) if events else 0
        if self._most > (end.dropped + end.omitted if end else unnumbered):
            raise _refused(path, self._line, self._what)


def _lines(file: BinaryIO, path: Path, max_bytes: int) -> Iterator[bytes]:
    """Lines, each with its end; the last may lack it."""
    number = read = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number, read = number + 1, read + len(line)
        if read > max_bytes:
            raise _refused(path, number, f"the file is longer than {max_bytes:,} bytes")
        if len(line) > MAX_LINE_BYTES:
            raise _refused(path, number, "the line is too long")
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
