"""JsonlWriter: a run's events as one self-contained file of JSON lines.

What it is: the reader of the bus that keeps what it reads. What it knows nothing about:
the engine, what a record means. Invariants: the first line says what ran; every line is
whole and flushed at each `pump`; the file stays within its bound, and its last line says
how much is missing, so a recording without that line is one whose run was cut off.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from nanovllm.core.events import BlockEvent, EventBus
from nanovllm.errors import ConfigError
from nanovllm.observe.records import RunEnd, RunHeader, end_record, header_record, to_record

DEFAULT_MAX_BYTES = 256 * 2**20
_END_BYTES = 160  # kept for the last line


class JsonlWriter:
    """Writes request, step and wait events, and with `blocks` block events too, up to `max_bytes`.

    `dropped` counts events the bus had forgotten, `omitted` records beyond the bound.
    """

    def __init__(
        self,
        bus: EventBus,
        path: Path,
        header: RunHeader,
        *,
        blocks: bool = False,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        """Replaces the file. Raises ConfigError where it cannot be written."""
        self._reader, self._blocks, self.omitted = bus.reader(), blocks, 0
        self._left_bytes = max_bytes - _END_BYTES
        self._is_measured = header.label == "measured"
        self._start_ns = time.process_time_ns()
        try:
            self._file = path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise ConfigError(f"The event log {path} cannot be written: {error.strerror}.", param="events") from error
        self._write(header_record(header))
        self._file.flush()

    @property
    def dropped(self) -> int:
        """Events that were lost before they could be read."""
        return self._reader.dropped

    def pump(self) -> None:
        """Write what is new and flush it."""
        for event in self._reader.poll():
            if self._blocks or not isinstance(event, BlockEvent):
                self._write(to_record(event))
        self._file.flush()

    def close(self) -> None:
        """Write what is left, say how the run ended, close the file. Safe to repeat."""
        if not self._file.closed:
            self.pump()
            processor_ns = time.process_time_ns() - self._start_ns if self._is_measured else 0
            self._file.write(_line(end_record(RunEnd(self.dropped, self.omitted, processor_ns))))
            self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        line = _line(record)
        if len(line) > self._left_bytes:  # json.dumps escapes: one character is one byte
            self._left_bytes = 0  # nor a shorter one later: what is kept has no holes
            self.omitted += 1
            return
        self._file.write(line)
        self._left_bytes -= len(line)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
