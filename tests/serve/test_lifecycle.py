"""From start to end: loading, ready, draining, signals, a failing engine; and that a library touches no signal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.errors import ModelNotFoundError
from nanovllm.serve.app import build_services
from nanovllm.serve.listener import bind
from nanovllm.serve.run import HttpServer
from tests.serve.servers import COMPLETIONS, LiveServer, ServerProcess, assert_alive, read_all, split, until

Factory = Callable[..., LiveServer]
Start = Callable[..., ServerProcess]


def open_stream(client: Any, stack: ExitStack, max_tokens: int) -> socket.socket:
    """A stream that has begun: its first event was read."""
    body = {"prompt": "go", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    sock = stack.enter_context(client.connect())
    sock.sendall(
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    seen = b""
    while b"data: " not in seen:
        piece = sock.recv(4096)
        assert piece, seen
        seen += piece
    assert seen.startswith(b"HTTP/1.1 200 ")
    return sock


# -- A3 and A4, with real signals -------------------------------------------------------------------


@pytest.mark.parametrize(("timeout_s", "tokens"), [(60, 400), (0.3, 1900)], ids=["time enough", "time runs out"])
def test_sigterm_drains(process: Start, timeout_s: float, tokens: int) -> None:
    running = process("--shutdown-timeout", str(timeout_s))
    with ExitStack() as stack:
        streams = [open_stream(running, stack, tokens) for _ in range(32)]
        running.signal(signal.SIGTERM)
        until(lambda: running.get("/health/ready").status == 503, "it does not drain")
        refused = running.complete()
        assert (refused.status, refused.code) == (503, "draining")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert running.get("/health").status == 200  # alive, and not to be restarted
        assert running.get("/health/ready").json == {"status": "draining"}
        ends = [read_all(sock) for sock in streams]
    for end in ends:
        assert b"data: [DONE]" in end or b'"code":"draining"' in end
    finished = sum(b"data: [DONE]" in end and b'"code"' not in end for end in ends)
    assert finished == (32 if timeout_s > 1 else 0)
    assert running.wait() == 0, running.errors()
    assert "Traceback" not in running.errors()


def test_an_idle_server_ends_at_once_and_idle_connections_do_not_hold_it(process: Start) -> None:
    running = process()
    with running.connect() as idle:
        idle.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(4096).startswith(b"HTTP/1.1 200 ")
        running.signal(signal.SIGINT)
        assert running.wait() == 0
    assert "Traceback" not in running.errors()


@pytest.mark.parametrize(
    ("flags", "second"),
    [
        pytest.param((), signal.SIGINT, id="thread-2"),
        pytest.param(("--engine-process",), signal.SIGTERM, id="process-15"),
        pytest.param((), signal.SIGTERM, id="thread-15", marks=pytest.mark.long),
        pytest.param(("--engine-process",), signal.SIGINT, id="process-2", marks=pytest.mark.long),
    ],
)
def test_a_second_signal_ends_it_now(process: Start, flags: tuple[str, ...], second: signal.Signals) -> None:
    running = process("--shutdown-timeout", "600", *flags)
    children = running.children()
    assert len(children) >= len(flags)
    with ExitStack() as stack:
        sock = open_stream(running, stack, 1900)
        running.signal(signal.SIGTERM)
        until(lambda: running.get("/health/ready").status == 503, "it does not drain")
        running.signal(second)
        assert running.wait(10) == 128 + second  # 600 s were left
        read_all(sock)
    until(lambda: not any(_is_alive(pid) for pid in children), "a child lives on")


def test_a_signal_while_loading(process: Start) -> None:
    running = ServerProcess()
    try:
        assert running.process.stderr is not None
        seen = b""
        while b"loading" not in seen.rpartition(b"http://")[2]:
            seen += os.read(running.process.stderr.fileno(), 4096)
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
        assert "Traceback" not in running.errors()
    finally:
        running.end()


def test_a_dead_parent_leaves_no_engine(process: Start) -> None:
    running = process("--engine-process")
    children = running.children()
    assert children
    running.signal(signal.SIGKILL)
    running.wait()
    until(lambda: not any(_is_alive(pid) for pid in children), "the engine's process lives on", 30)


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


# -- within this process ----------------------------------------------------------------------------


def test_draining_from_within(fresh_server: Factory) -> None:
    live = fresh_server(shutdown_timeout=30)
    with ExitStack() as stack:
        sock = open_stream(live, stack, 300)
        live.server.stop()
        until(lambda: live.get("/health/ready").status == 503, "it does not drain")
        assert live.complete().code == "draining"
        assert live.get("/v1/models").status == 200
        assert b"data: [DONE]" in read_all(sock)
    live.stop()
    with pytest.raises(OSError):
        live.get("/health")


def test_no_signal_handler_is_touched() -> None:
    """In the main thread, where uvicorn would install its own."""
    engine, config, limits = split({})
    seen = []

    async def main() -> None:
        server = HttpServer(build_services(engine, config, limits), bind(config))
        ready = asyncio.Event()
        running = asyncio.create_task(server.run(ready.set))
        await asyncio.wait_for(ready.wait(), 60)
        seen.append([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)])
        server.stop()
        await asyncio.wait_for(running, 60)

    assert threading.current_thread() is threading.main_thread()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with asyncio.Runner() as runner:  # `Runner.run` sets SIGINT's for the time it runs
        runner.get_loop().run_until_complete(main())
    assert seen == [before]


def test_a_stop_before_the_start() -> None:
    engine, config, limits = split({})
    server = HttpServer(build_services(engine, config, limits), bind(config))
    server.stop()
    asyncio.run(asyncio.wait_for(server.run(lambda: None), 60))
    assert not server.services.is_loaded


def test_while_loading_the_port_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    start = AsyncEngine.start

    async def slow(self: AsyncEngine) -> None:
        await asyncio.to_thread(go_on.wait, 60)
        await start(self)

    monkeypatch.setattr(AsyncEngine, "start", slow)
    live = LiveServer(api_key=("k",))
    starting = threading.Thread(target=live.start)
    starting.start()
    try:
        until(lambda: _status(live, "/health") == 200, "the port does not answer")
        assert live.get("/health").json == {"status": "loading"}
        assert live.get("/health/ready").status == 503
        for answer in (live.complete(), live.get("/v1/models")):
            assert (answer.status, answer.code) == (503, "loading")
            assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert live.get("/version").status == 200
        assert live.complete(headers={"Authorization": "Bearer x"}).status == 401
    finally:
        go_on.set()
        starting.join()
    assert_alive(live)
    live.stop()


def _status(live: LiveServer, path: str) -> int:
    try:
        return live.get(path).status
    except OSError:
        return 0


def test_a_model_that_is_not_there() -> None:
    engine, config, limits = split({"model": "./no/such/model.gguf"})
    server = HttpServer(build_services(engine, config, limits), bind(config))
    with pytest.raises(ModelNotFoundError):
        asyncio.run(asyncio.wait_for(server.run(lambda: None), 60))


def test_health_follows_the_heartbeat(fresh_server: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    live = fresh_server(heartbeat_age=5.0)
    with monkeypatch.context() as patch:
        patch.setattr(AsyncEngine, "heartbeat_age_s", 5.1)
        assert (live.get("/health").status, live.get("/health").json) == (503, {"status": "hanging"})
        assert live.get("/ping").status == live.get("/health/ready").status == 503
        patch.setattr(AsyncEngine, "heartbeat_age_s", 4.9)
        assert live.get("/health").status == live.get("/health/ready").status == 200
    assert_alive(live)


def test_the_heartbeat_is_the_engines(fresh_server: Factory) -> None:
    live = fresh_server(heartbeat_age=3.0)
    time.sleep(3.5)  # idle for longer than a heartbeat may be old
    assert live.get("/health").status == 200


@pytest.mark.parametrize("state", ["unhealthy", "dead"])
def test_a_failed_engine_is_said_so(fresh_server: Factory, state: str) -> None:
    live = fresh_server()
    live.services.engine.state = state  # type: ignore[assignment]
    for path in ("/health", "/health/ready", "/ping"):
        answer = live.get(path)
        assert (answer.status, answer.json) == (503, {"status": state})
    assert (live.complete().status, live.complete().code) == (503, "engine_unhealthy")
    live.services.engine.state = "ready"
    assert_alive(live)


def test_bad_steps_take_it_out_of_rotation_only(fresh_server: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    live = fresh_server()
    stats = live.services.engine.stats
    monkeypatch.setattr(AsyncEngine, "stats", type(stats)(bad_steps_in_a_row=1), raising=False)
    live.services.engine.__dict__.pop("stats")
    assert (live.get("/health").status, live.get("/health/ready").status) == (200, 503)
    live.services.engine.stats = stats
    assert live.get("/health/ready").status == 200


def test_a_killed_engine_process(fresh_server: Factory) -> None:
    """A5: requests fail, health says it, the next engine serves."""
    live = fresh_server(engine_process=True)
    with ExitStack() as stack:
        sock = open_stream(live, stack, 900)
        pid = live.services.engine.link.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        assert b'"code":"engine_unhealthy"' in read_all(sock)
    until(lambda: live.get("/health").json == {"status": "restarting"}, "it does not say so")
    answers = live.get("/health"), live.complete()
    assert [(one.status, "retry-after" in one.headers) for one in answers] == [(503, True), (503, True)]
    assert answers[1].code == "engine_unhealthy"
    until(lambda: live.get("/health/ready").status == 200, "no other engine came", 60)
    assert_alive(live)
