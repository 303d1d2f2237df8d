"""What the server's benchmarks share: a server in a process of its own, and a client that only collects bytes.

The client is one thread over non-blocking sockets. While a run lasts it stores each piece of bytes with its
moment and does nothing else; it parses when the run is over, and says how much processor time it took itself.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
START_S, RUN_S = 120.0, 300.0
RECEIVE_BYTES = 2**18


@dataclass
class Exchange:
    """One request: when it was sent, and what came back when."""

    sent_s: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None

    @property
    def data(self) -> bytes:
        """All bytes of the answer."""
        return b"".join(piece for _, piece in self.pieces)

    @property
    def status(self) -> int:
        """The HTTP status; 0 where none came."""
        found = re.match(rb"HTTP/1\.1 (\d{3})", self.data)
        return int(found[1]) if found else 0

    @property
    def seconds(self) -> float:
        """From sending to the last byte."""
        return self.pieces[-1][0] - self.sent_s if self.pieces else float("inf")


@contextmanager
def server(*flags: str) -> Iterator[int]:
    """`nanovllm serve` with these flags on a free port, which is the value."""
    command = [sys.executable, "-m", "nanovllm", "serve", *flags, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield port_of(process)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def exchange(port: int, requests: list[bytes], *, starts_s: list[float] | None = None) -> tuple[list[Exchange], float]:
    """Send each request over a connection of its own and collect the answers; also our processor seconds.

    `starts_s[i]` is when request i begins, from now. Every answer must end with the connection.
    """
    exchanges = [Exchange() for _ in requests]
    selector = selectors.DefaultSelector()
    busy_s, begin_s = time.process_time(), time.perf_counter()
    waiting = sorted(range(len(requests)), key=lambda i: starts_s[i] if starts_s else 0.0, reverse=True)
    num_open = 0
    while waiting or num_open:
        now_s = time.perf_counter() - begin_s
        if now_s > RUN_S:
            raise SystemExit(f"the server did not answer within {RUN_S:.0f} s")
        while waiting and (starts_s is None or starts_s[waiting[-1]] <= now_s):
            num_open += _begin(selector, port, requests[waiting[-1]], exchanges[waiting.pop()])
        pause_s = max(0.0, starts_s[waiting[-1]] - now_s) if waiting and starts_s else 1.0
        for key, _ in selector.select(min(pause_s, 1.0)):
            num_open -= _advance(selector, key)
    selector.close()
    return exchanges, time.process_time() - busy_s


def post(path: str, body: dict[str, object]) -> bytes:
    """A request whose connection ends with its answer."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def get(port: int, path: str) -> str:
    """The text of a page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return answer.read().decode()


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def stolen_s() -> float:
    """Processor seconds that a host has taken from this machine so far; 0 where the system does not say."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def _begin(selector: selectors.BaseSelector, port: int, request: bytes, exchange: Exchange) -> int:
    """Connect and register; 1 if the exchange is under way."""
    connection = socket.socket()
    connection.setblocking(False)
    exchange.sent_s = time.perf_counter()
    connection.connect_ex(("127.0.0.1", port))
    selector.register(connection, selectors.EVENT_WRITE, (memoryview(request), exchange))
    return 1


def _advance(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> int:
    """Send or receive what is possible; 1 if that was the end."""
    connection, (left, exchange) = key.fileobj, key.data
    assert isinstance(connection, socket.socket)
    try:
        if left:
            left = left[connection.send(left) :]
            events = selectors.EVENT_WRITE if left else selectors.EVENT_READ
            selector.modify(connection, events, (left, exchange))
            return 0
        data = connection.recv(RECEIVE_BYTES)
        if data:
            exchange.pieces.append((time.perf_counter(), data))
            return 0
    except BlockingIOError:
        return 0
    except OSError as error:
        exchange.error = str(error)
    selector.unregister(connection)
    connection.close()
    return 1


def port_of(process: subprocess.Popen[str]) -> int:
    """Read the server's output until it names its address; the rest is read and dropped by a thread."""
    import threading

    assert process.stdout is not None
    deadline, seen = time.monotonic() + START_S, []
    for line in process.stdout:
        seen.append(line)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found:
            threading.Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()
            _wait_ready(int(found[1]), deadline)
            return int(found[1])
    raise SystemExit("the server did not start:\n" + "".join(seen[-5:]))


def _wait_ready(port: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            get(port, "/health/ready")
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server was not ready in time")
