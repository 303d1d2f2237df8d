"""Server-sent events, cut out of bytes as they come.

What it is: an incremental parser of `text/event-stream` that keeps what OpenAI-style
servers use of it, the `data` of each event. What it knows nothing about: sockets,
JSON, time. Invariants: what comes out does not depend on where the bytes were cut,
in the middle of a character included; no input makes it hold more than
`MAX_EVENT_BYTES`; an event without its closing blank line is no event.
"""

from __future__ import annotations

from nanovllm.errors import RemoteError

MAX_EVENT_BYTES = 2**20


class EventParser:
    """Feed it bytes; each call gives the data of the events that these bytes completed."""

    def __init__(self) -> None:
        self._rest = bytearray()  # a line whose end has not come yet
        self._data: list[bytes] = []  # data lines of an event whose blank line has not come yet
        self._data_bytes = 0
        self._ended_with_cr = False

    def feed(self, chunk: bytes) -> list[str]:
        """Raises RemoteError (code event_too_long) where the bound is passed."""
        if self._ended_with_cr and chunk:  # CR LF is one line end, also when it was cut in two
            chunk = chunk.removeprefix(b"\n")
            self._ended_with_cr = False
        if not chunk:
            return []
        self._ended_with_cr = chunk.endswith(b"\r")
        lines = self._whole_lines(chunk)
        self._check_size(len(self._rest))
        found = [self._line(line) for line in lines]
        return [data for data in found if data is not None]

    def _whole_lines(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` ends, without their ends; the rest is kept."""
        if b"\n" not in chunk and b"\r" not in chunk:
            self._rest += chunk
            return []
        lines = (bytes(self._rest) + chunk).splitlines(keepends=True)
        self._rest = bytearray(b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop())
        return [line.rstrip(b"\r\n") for line in lines]

    def _line(self, line: bytes) -> str | None:
        """One line's effect; the event's data where this line ended one."""
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        if name in (b"data", b"error"):  # `error:` is how older llama.cpp servers send a failure
            self._data.append(value.removeprefix(b" "))
            self._data_bytes += len(value)
            self._check_size(self._data_bytes)
        return None  # comments (an empty name) and other fields carry nothing for us

    def _dispatch(self) -> str | None:
        if not self._data:
            return None
        text = b"\n".join(self._data).decode("utf-8", "replace")
        self._data, self._data_bytes = [], 0
        return text

    @staticmethod
    def _check_size(count: int) -> None:
        if count > MAX_EVENT_BYTES:
            raise RemoteError(f"The server sent an event of more than {MAX_EVENT_BYTES} bytes.", code="event_too_long")
