"""An HTTP server on 127.0.0.1 that does what a script says, misbehaviour included.

A script is called with the request and gives steps: bytes to send as they are, seconds to wait, or HANG. After
the last step the connection is closed. `gone` is set when a client closed its end before the script was over.
"""

from __future__ import annotations

import json
import select
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

HANG = object()
Step = bytes | float | object


@dataclass(frozen=True)
class Seen:
    """One request as the server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    number: int  # of those to this path, from 0


Script = Callable[[Seen], Iterable[Step]]


class ScriptedServer:
    """Answers `/v1/models` by itself and everything else by its script. Use it as a context manager."""

    def __init__(self, script: Script, models: Iterable[str] = ("scripted",)) -> None:
        self.script, self.models = script, list(models)
        self.seen: list[Seen] = []
        self.gone, self._stop, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self.under_way = self.most_under_way = 0
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                outer._handle(self)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self._server.request_queue_size = 128
        self._server.daemon_threads = True
        self._server.server_bind()
        self._server.server_activate()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def posts(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "POST"]

    def _handle(self, handler: socketserver.StreamRequestHandler) -> None:
        seen = self._read(handler)
        if seen is None:
            return
        with self._lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            steps = models(self.models) if seen.path.endswith("/v1/models") else self.script(seen)
            for step in steps:
                if not self._do(handler, step):
                    self.gone.set()
                    return
        finally:
            with self._lock:
                self.under_way -= 1

    def _read(self, handler: socketserver.StreamRequestHandler) -> Seen | None:
        first = handler.rfile.readline().decode().split()
        if len(first) < 2:
            return None
        headers = {}
        while line := handler.rfile.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        data = handler.rfile.read(int(headers.get("content-length", 0)))
        with self._lock:
            number = sum(old.path == first[1] for old in self.seen)
            seen = Seen(first[0], first[1], headers, json.loads(data) if data else None, number)
            self.seen.append(seen)
        return seen

    def _do(self, handler: socketserver.StreamRequestHandler, step: Step) -> bool:
        """Carry out one step; False when the client has gone."""
        if isinstance(step, bytes):
            try:
                handler.wfile.write(step)
            except OSError:
                return False
            return not self._is_closed(handler, 0)
        end = time.monotonic() + step if isinstance(step, int | float) else float("inf")
        while (left := end - time.monotonic()) > 0 and not self._stop.is_set():
            if self._is_closed(handler, min(left, 0.02)):
                return False
        return True

    @staticmethod
    def _is_closed(handler: socketserver.StreamRequestHandler, wait_s: float) -> bool:
        readable, _, _ = select.select([handler.connection], [], [], wait_s)
        try:
            return bool(readable) and not handler.connection.recv(1)
        except OSError:
            return True


def head(status: str = "200 OK", kind: str = "text/event-stream", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Server: scripted", "Connection: close", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def models(names: list[str]) -> Iterator[bytes]:
    yield head(kind="application/json")
    yield json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()


def refusal(status: str, message: str, code: str = "some_code") -> list[bytes]:
    error = {"error": {"message": message, "type": "x", "param": None, "code": code}}
    return [head(status, "application/json"), json.dumps(error).encode()]


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def piece(text: str, finish: str | None = None, *, is_chat: bool = True) -> bytes:
    """One event with text."""
    choice = {"index": 0, "finish_reason": finish}
    return event({"choices": [{**choice, "delta": {"content": text}} if is_chat else {**choice, "text": text}]})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
DONE = event(b"[DONE]")


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    details = {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}
    return event({"choices": [], "usage": counts})


def answer(*texts: str, cached: int = 0, first_s: float = 0.0, gap_s: float = 0.0) -> Iterator[Step]:
    """A well-behaved answer, one token a text."""
    yield head()
    yield ROLE
    yield first_s
    for text in texts:
        yield piece(text)
        yield gap_s
    yield piece("", "stop") + usage(5, len(texts), cached) + DONE
