"""Clients that go away: at six points of a request's life, streaming or not, fifty times each.

Whatever the point, the engine hears of it once, the request's blocks are free within two steps,
and nothing of it is left: no slot, no stream, no task, no file descriptor.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from nanovllm.core.events import RequestEvent
from nanovllm.engine.integrity import check_blocks
from nanovllm.engine.links import ThreadLink
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import Abort
from tests.engine.fakes import FakeStatePlane, Load
from tests.serve.surface import Live, live_server

TIMES = 50
WAIT_S = 30
ENDLESS = 1900
LEFT_STAGES = ("output_complete", "aborted", "failed", "rejected")


@dataclass
class Watch:
    """What happened to each request, in engine steps."""

    engine: LLMEngine
    aborted_at: dict[str, int] = field(default_factory=dict)
    freed_at: dict[str, int] = field(default_factory=dict)

    def note_abort(self, request_id: str) -> None:
        self.aborted_at.setdefault(request_id, self.engine.marks.num_steps)

    def look(self) -> None:
        """After each turn: which of the aborted ones hold nothing any more."""
        for request_id in self.aborted_at.keys() - self.freed_at.keys():
            if not self.engine.book.sequences(request_id):
                self.freed_at[request_id] = self.engine.marks.num_steps


@dataclass
class Bench:
    """A live server whose engine can be looked into and slowed down."""

    live: Live
    engine: LLMEngine
    watch: Watch
    slow_s: float = 0.0

    def connect(self, path: str, body: dict[str, object], sent: float = 1.0) -> socket.socket:
        """Send a request, or the first part of its body."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", int(self.live.url.rsplit(":", 1)[1])), timeout=WAIT_S)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: int(len(data) * sent)])
        return connection

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.002)

    def at_rest(self) -> bool:
        scheduler, services = self.engine.scheduler, self.live.services
        idle = not (scheduler.running or scheduler.waiting or scheduler.loading or self.engine.book.request_ids)
        return idle and not services.engine.num_live and not services.admission.in_flight


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    if os.environ.get("NANOVLLM_TEST_ENGINE") == "process":
        pytest.fail("these look into the engine: run them in a thread")
    server = {"max_queued_requests": 256, "max_queued_tokens": 10**6, "shutdown_timeout": 1.0}
    settings = {"dtype": "float32", "num_blocks": 2048, "max_num_batched_tokens": 64, "max_num_seqs": 64}
    with live_server("tiny:random", server=server, **settings) as live:
        link = live.services.engine.link
        assert isinstance(link, ThreadLink) and link.engine_loop is not None
        engine, send = link.engine_loop.engine, link.send
        watch = Watch(engine)
        made = Bench(live, engine, watch)

        def noting(message: object) -> None:
            if isinstance(message, Abort):
                watch.note_abort(message.request_id)
            send(message)  # type: ignore[arg-type]

        launch, step = engine.runner.launch, engine.step

        def slow(batch: object) -> object:
            time.sleep(made.slow_s)
            return launch(batch)  # type: ignore[arg-type]

        def watched() -> list[object]:
            outputs = step()
            watch.look()
            check_blocks(manager, engine.scheduler.live())
            return outputs  # type: ignore[return-value]

        manager = engine.scheduler.kv.block_manager  # type: ignore[attr-defined]
        link.send = noting  # type: ignore[method-assign]
        engine.runner.launch = slow  # type: ignore[method-assign]
        engine.step = watched  # type: ignore[method-assign,assignment]
        yield made


def body(is_stream: bool, prompt_len: int = 20, max_tokens: int = ENDLESS) -> dict[str, object]:
    fields: dict[str, object] = {"prompt": [7] * prompt_len, "max_tokens": max_tokens, "ignore_eos": True}
    return {**fields, "temperature": 0, "stream": is_stream}


def leave(bench: Bench, connections: list[socket.socket], is_abrupt: bool) -> None:
    for connection in connections:
        if is_abrupt:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()


def check(bench: Bench, first_event: int, num_entered: int, last_stage: str) -> None:
    """All is over: one terminal event each, blocks free within two steps of the abort."""
    bench.wait(bench.at_rest, "something is left")
    manager = bench.engine.scheduler.kv.block_manager  # type: ignore[attr-defined]
    assert bench.engine.scheduler.kv.num_free_blocks == len(manager.blocks)
    events = [e for e in bench.engine.events.since(first_event) if isinstance(e, RequestEvent)]
    ends = Counter(e.request_id for e in events if e.stage in LEFT_STAGES)
    stages = Counter(e.stage for e in events if e.stage in LEFT_STAGES)
    assert set(ends.values()) <= {1} and len(ends) == num_entered, ends
    assert stages == Counter({last_stage: num_entered}) if num_entered else not stages
    late = {r: (a, bench.watch.freed_at.get(r)) for r, a in bench.watch.aborted_at.items() if r in ends}
    assert all(freed is not None and freed - aborted <= 2 for aborted, freed in late.values()), late


def stages_since(bench: Bench, first_event: int) -> Counter[str]:
    return Counter(e.stage for e in bench.engine.events.since(first_event) if isinstance(e, RequestEvent))


def running(bench: Bench) -> list[int]:
    return [seq.num_completion_tokens for seq in bench.engine.scheduler.running]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
class TestPoints:
    def test_before_tokenizing(self, bench: Bench, is_stream: bool) -> None:
        start = bench.engine.events.emitted
        connections = [bench.connect("/v1/completions", body(is_stream), sent=0.5) for _ in range(TIMES)]
        bench.wait(lambda: bench.live.services.admission.in_flight == TIMES, "the slots are taken by the head alone")
        leave(bench, connections, is_stream)
        check(bench, start, 0, "")

    def test_while_queued(self, bench: Bench, is_stream: bool) -> None:
        bench.slow_s = 0.005
        blockers = [bench.connect("/v1/completions", body(False)) for _ in range(64)]
        bench.wait(lambda: len(bench.engine.scheduler.running) == 64, "all places are taken")
        start = bench.engine.events.emitted
        queued = [bench.connect("/v1/completions", body(is_stream)) for _ in range(TIMES)]
        bench.wait(lambda: len(bench.engine.scheduler.waiting) == TIMES, "all wait")
        leave(bench, queued, is_stream)
        bench.wait(lambda: stages_since(bench, start)["aborted"] == TIMES, "those that waited are gone")
        leave(bench, blockers, False)
        check(bench, start, TIMES + 64, "aborted")

    def test_in_the_middle_of_prefill(self, bench: Bench, is_stream: bool) -> None:
        bench.slow_s = 0.005
        start = bench.engine.events.emitted
        long = [body(is_stream, prompt_len=1500) | {"cache_salt": str(i)} for i in range(TIMES)]
        connections = [bench.connect("/v1/completions", one) for one in long]
        bench.wait(lambda: any(s.num_cached_tokens > 0 for s in bench.engine.scheduler.running), "a chunk was computed")
        bench.wait(lambda: len(bench.engine.book.request_ids) == TIMES, "all have entered")
        assert all(seq.is_prefilling for seq in bench.engine.scheduler.running)
        leave(bench, connections, is_stream)
        check(bench, start, TIMES, "aborted")

    def test_in_the_middle_of_decode(self, bench: Bench, is_stream: bool) -> None:
        bench.slow_s = 0.005
        start = bench.engine.events.emitted
        connections = [bench.connect("/v1/completions", body(is_stream)) for _ in range(TIMES)]
        bench.wait(lambda: len(running(bench)) == TIMES and min(running(bench)) > 3, "all decode")
        leave(bench, connections, is_stream)
        check(bench, start, TIMES, "aborted")

    def test_while_state_is_loaded(self, bench: Bench, is_stream: bool) -> None:
        bench.slow_s = 0.0
        scheduler = bench.engine.scheduler
        device, start = scheduler.kv, bench.engine.events.emitted
        plane = FakeStatePlane(device, lambda seq: Load(delay=200))  # type: ignore[arg-type]
        scheduler.kv = plane
        try:
            bodies = [body(is_stream, prompt_len=64) | {"cache_salt": f"load {is_stream} {i}"} for i in range(TIMES)]
            connections = [bench.connect("/v1/completions", one) for one in bodies]
            bench.wait(lambda: plane.num_loads >= TIMES, "all have asked for state")
            leave(bench, connections, is_stream)
            bench.wait(lambda: bench.at_rest() and plane.is_settled(), "the loads have ended")
        finally:
            scheduler.kv = device
        events = [e for e in bench.engine.events.since(start) if isinstance(e, RequestEvent)]
        ends = Counter(e.request_id for e in events if e.stage in LEFT_STAGES)
        assert len(ends) == TIMES and set(ends.values()) == {1}

    def test_after_the_last_token(self, bench: Bench, is_stream: bool) -> None:
        bench.slow_s = 0.0
        start = bench.engine.events.emitted
        connections = [bench.connect("/v1/completions", body(is_stream, max_tokens=5)) for _ in range(TIMES)]
        for connection in connections:
            seen = b""
            while b'"finish_reason":"length"' not in seen:
                piece = connection.recv(65536)
                assert piece, seen
                seen += piece
        leave(bench, connections, is_stream)
        check(bench, start, TIMES, "output_complete")


def test_nothing_piles_up(bench: Bench) -> None:
    """Threads, file descriptors and tasks are as many after hundreds of vanished clients as before."""
    bench.slow_s = 0.0

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def round_of_clients() -> None:
        connections = [bench.connect("/v1/completions", body(i % 2 == 0)) for i in range(TIMES)]
        bench.wait(lambda: len(running(bench)) > 0, "some run")
        leave(bench, connections, True)
        bench.wait(bench.at_rest, "something is left")

    round_of_clients()
    bench.wait(lambda: counts()[0] < 500, "the sockets are closed")
    time.sleep(0.3)
    before = counts()
    for _ in range(4):
        round_of_clients()
    bench.wait(lambda: counts()[0] <= before[0] + 2 and counts()[1] <= before[1], f"from {before} to {counts()}")
    assert bench.live.chat(max_tokens=2).status_code == 200
