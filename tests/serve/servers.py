"""Real servers on real sockets: in a thread of this process, and as a process of their own for signals."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine.integrity import check_blocks
from nanovllm.engine.links import ThreadLink
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.serve.app import build_services
from nanovllm.serve.config import LIMIT_PREFIX, Limits, ServerConfig
from nanovllm.serve.listener import bind
from nanovllm.serve.run import HttpServer

ROOT = Path(__file__).resolve().parents[2]
START_S, STOP_S, ASK_S = 120, 60, 60
IN_PROCESS = os.environ.get("NANOVLLM_TEST_ENGINE", "thread") == "process"
ENGINE = {"dtype": "float32", "kv_memory": "4MiB"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Answer:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code; the error has the one shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["code"]


@dataclass
class Client:
    """Asks one server."""

    host: str
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own. `body`: JSON-able, or bytes as they are."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ASK_S)
        with contextlib.closing(connection):
            whole = {**self.headers, **(headers or {})}
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            if method in ("POST", "PUT"):
                whole = {"Content-Type": "application/json", **whole}
            connection.request(method, path, body, whole)
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def complete(self, prompt: Any = "Hello", headers: dict[str, str] | None = None, **more: Any) -> Answer:
        body = {"model": "tiny:random", "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        return self.ask("POST", COMPLETIONS, body, headers)

    def raw(self, data: bytes, timeout_s: float = ASK_S) -> bytes:
        """Send bytes as they are and read until the server closes, or has answered and `timeout_s` pass."""
        with socket.create_connection((self.host, self.port), timeout=timeout_s) as sock:
            sock.sendall(data)
            return read_all(sock)

    def connect(self, timeout_s: float = ASK_S) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout_s)


class LiveServer(Client):
    """A server in a thread of this process, run by the verb's own runner without its signal handlers."""

    def __init__(self, **settings: Any) -> None:
        engine, server, limits = split(settings)
        self.services = build_services(engine, server, limits)
        self.server = HttpServer(self.services, bind(server))
        self.failures: list[BaseException] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server under test", daemon=True)
        host, port = self.server.url.removeprefix("http://").rsplit(":", 1)
        super().__init__(host.strip("[]"), int(port))
        key = (*server.api_key, server.admin_key or "")[0].rpartition(":")[2]
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def start(self) -> LiveServer:
        self._thread.start()
        assert self._ready.wait(START_S) and not self.failures, self.failures
        return self

    def _run(self) -> None:
        try:
            asyncio.run(self.server.run(self._ready.set))
        except BaseException as error:  # noqa: BLE001  told to the test, whatever it is
            self.failures.append(error)
        finally:
            self._ready.set()

    def stop(self) -> None:
        """Drain and end; nothing is left and nothing failed."""
        self.server.stop()
        self._thread.join(STOP_S)
        assert not self._thread.is_alive() and not self.failures, self.failures
        assert self.services.admission.in_flight == 0 and self.services.engine.num_live == 0

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def engine(self) -> LLMEngine | None:
        """The engine itself, where it runs in a thread of this process."""
        link = self.services.engine.link
        return link.engine_loop.engine if isinstance(link, ThreadLink) and link.engine_loop is not None else None


def thread_only(why: str) -> pytest.MarkDecorator:
    """For the few tests that must look into the engine, which a child process does not let them."""
    return pytest.mark.skipif(IN_PROCESS, reason=why)


def split(settings: dict[str, Any]) -> tuple[EngineConfig, ServerConfig, Limits]:
    """Settings by name, as the verb takes them, to the three that hold them."""
    of_engine = {f.name for f in fields(EngineConfig)}
    of_server = {f.name for f in fields(ServerConfig)}
    engine = ENGINE | {name: value for name, value in settings.items() if name in of_engine}
    if "num_blocks" in engine:
        del engine["kv_memory"]
    server = {name: value for name, value in settings.items() if name in of_server}
    limits = {name.removeprefix(LIMIT_PREFIX): v for name, v in settings.items() if name.startswith(LIMIT_PREFIX)}
    assert settings.keys() <= of_engine | server.keys() | {LIMIT_PREFIX + name for name in limits}
    config = ServerConfig(**{"port": 0, "engine_process": IN_PROCESS, **server})
    return EngineConfig(**{"model": "tiny:random", **engine}), config, Limits(**limits)


def assert_alive(server: LiveServer) -> None:
    """The next ten normal requests succeed, the server is ready, and its books are clean."""
    for number in range(10):
        answer = server.complete(f"request {number}")
        assert answer.status == 200, answer.body
        assert answer.json["usage"]["completion_tokens"] >= 1
    assert server.get("/health").status == 200 and server.get("/health/ready").status == 200
    assert_at_rest(server)


def assert_at_rest(server: LiveServer) -> None:
    """What is asked has been answered, and nothing of it is held any more; the engine's own report says so."""
    until(lambda: server.services.engine.num_live == 0, "requests live on")
    admission = server.services.admission
    until(lambda: admission.in_flight == 0, "slots are held")
    assert (admission.queued_requests, admission.queued_tokens, dict(admission.in_flight_of)) == (0, 0, {})
    until(lambda: is_at_rest(server), "blocks are held")
    if server.engine is not None:
        blocks = server.engine.scheduler.kv.block_manager
        check_blocks(blocks, ())
        assert not list(blocks.leases)


def is_at_rest(server: LiveServer) -> bool:
    """The engine says that nothing lives and every block is free."""
    stats = server.services.engine.stats
    return stats.free_blocks == stats.num_blocks and not (stats.running or stats.waiting or stats.loading)


def until(condition: Callable[[], bool], message: str, timeout_s: float = 20.0) -> None:
    """Wait for something that is about to be true."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, message
        time.sleep(0.01)


def read_all(sock: socket.socket, most: int = 2**20) -> bytes:
    """Everything until the other side closes; a reset is an end too."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while len(data) < most and (piece := sock.recv(65536)):
            data += piece
    return data


def read_head(sock: socket.socket) -> bytes:
    """Up to the blank line after the headers."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(4096)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


class ServerProcess(Client):
    """`nanovllm serve` as a process, or another module that does the same; the port is read off its output."""

    def __init__(self, *arguments: str, module: str = "nanovllm", **env: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("NANOVLLM_") or k == "NANOVLLM_CACHE"}
        whole = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        flags = ["--port", "0", "--kv-memory", "4MiB", "--dtype", "float32"]
        flags += ["--engine-process"] if IN_PROCESS else []
        command = [sys.executable, "-m", module, "serve", "tiny:random", *flags, *arguments]
        self.process = subprocess.Popen(
            command, env=whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        super().__init__("127.0.0.1", 0)
        self.out = b""

    def wait_ready(self) -> ServerProcess:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            end_s = time.monotonic() + START_S
            while b"curl " not in self.out and time.monotonic() < end_s and selector.select(1.0) is not None:
                if self.process.poll() is not None:
                    break
                if selector.select(0):
                    self.out += os.read(self.process.stdout.fileno(), 4096)
        found = re.search(rb"Serving \S+ at http://127\.0\.0\.1:(\d+)", self.out)
        assert found, (self.out, self.process.poll(), self.errors() if self.process.poll() is not None else "")
        self.port = int(found[1])
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        return self.process.wait(timeout_s)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode(errors="replace")

    def children(self) -> list[int]:
        """Processes whose parent it is."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[LiveServer]:
    """A server for one test that ends or breaks it."""
    live = LiveServer(**settings).start()
    try:
        yield live
    finally:
        if live.is_running:
            live.stop()
