"""Connection: uvicorn's HTTP/1.1 protocol, with the deadlines and bounds it lacks.

What it is: a subclass of uvicorn's h11 protocol. What it knows nothing about: what is
asked. Invariants: a connection that is not being served ends after a deadline that no
dribbled byte puts off; a malformed or oversized head is answered in the shape of every
other failure; one connection too many is told so, not cut.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm.errors import BusyError, NanoVLLMError
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.failures import Headers, HttpError, body_of, headers_of

TOO_LARGE = 431


class HeadTooLargeError(HttpError):
    """The request line and headers are larger than the limit."""

    status, code = TOO_LARGE, "head_too_large"


class Connection(H11Protocol):
    """One client's connection."""

    def __init__(self, *args: Any, settings: ServerConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._application, self.app = self.app, self._serve
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(self._settings.header_timeout)
        if len(self.connections) > self._settings.max_connections:
            self._application = _one_too_many

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Between two requests, or while the rest of a refused body still comes."""
        self._wait(self._settings.keep_alive_timeout)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Called where what came is no HTTP; h11 says whether it was too much of it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            hint = getattr(sys.exc_info()[1], "error_status_hint", 400)
            for event in _events_of(HeadTooLargeError(msg) if hint == TOO_LARGE else HttpError(msg)):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An answer that broke off ends its connection, whether or not the client takes what was written."""
        cycle = self.cycle
        try:
            if _head_bytes(scope) > (self.config.h11_max_incomplete_event_size or 0):  # it came whole, in one piece
                await _refuse(HeadTooLargeError("The head of the request is too large."), send)
            else:
                await self._application(scope, receive, send)
        finally:
            if cycle.response_started and not cycle.response_complete:
                self.transport.abort()

    def _wait(self, timeout_s: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _events_of(error: NanoVLLMError) -> list[h11.Event]:
    body = body_of(error, "")
    response = h11.Response(status_code=error.status, headers=_headers_of(error, body))
    return [response, h11.Data(data=body), h11.EndOfMessage()]


def _headers_of(error: NanoVLLMError, body: bytes) -> Headers:
    length = (b"content-length", b"%d" % len(body))
    return [(b"content-type", b"application/json"), length, (b"connection", b"close"), *headers_of(error)]


def _head_bytes(scope: Scope) -> int:
    """The request line and the headers, as they came."""
    query = scope["query_string"]
    line = len(scope["method"]) + len(scope["raw_path"]) + len(query) + bool(query) + len("  HTTP/1.1\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])


async def _one_too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection too many."""
    await _refuse(BusyError("Too many connections are open.", hint="Try again later."), send)


async def _refuse(error: NanoVLLMError, send: Send) -> None:
    """Answer, and close the connection."""
    body = body_of(error, "")
    await send({"type": "http.response.start", "status": error.status, "headers": _headers_of(error, body)})
    await send({"type": "http.response.body", "body": body})
