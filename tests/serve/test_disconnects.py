"""Clients that go away: at six points of a request's life, streaming or not, fifty times each.

Whatever the point, the engine hears of it once and says so once, the request's blocks are free,
and nothing of it is left: no slot, no stream, no task, no file descriptor. All that is read off the
messages. Where the engine runs in a thread, its own records are read too: one terminal event each,
and blocks free within two steps of the abort.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

from nanovllm.core.events import RequestEvent
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import Abort, EngineStats, StepReport, Submit, ToEngine
from tests.engine.fakes import FakeStatePlane, Load
from tests.serve.breakable import SLOW, breakable
from tests.serve.servers import COMPLETIONS, LiveServer, assert_alive, is_at_rest, running, thread_only, until

TIMES = 50
ENDLESS = 1900
FAST = 7
LEFT_STAGES = ("output_complete", "aborted", "failed", "rejected")


@dataclass
class Watch:
    """What was said about each request, to the engine and by it."""

    live: LiveServer
    submitted: list[str] = field(default_factory=list)
    num_aborts: Counter[str] = field(default_factory=Counter)
    num_tokens: Counter[str] = field(default_factory=Counter)
    ends: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    aborted_at: dict[str, int] = field(default_factory=dict)  # in steps of an engine that can be looked into
    freed_at: dict[str, int] = field(default_factory=dict)

    def said(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self.submitted.append(message.request_id)
        elif isinstance(message, Abort):
            self.num_aborts[message.request_id] += 1
            if self.live.engine is not None:
                self.aborted_at.setdefault(message.request_id, self.live.engine.marks.num_steps)

    def heard(self, report: StepReport) -> None:
        for delta in report.deltas:
            self.num_tokens[delta.request_id] += len(delta.token_ids)
        for finished in report.finished:
            self.ends[finished.request_id].extend(finished.finish_reasons)

    def look(self, engine: LLMEngine) -> None:
        """After each turn: which of the aborted ones hold nothing any more."""
        for request_id in self.aborted_at.keys() - self.freed_at.keys():
            if not engine.book.sequences(request_id):
                self.freed_at[request_id] = engine.marks.num_steps


@dataclass
class Bench:
    """A live server whose messages are read."""

    live: LiveServer
    watch: Watch

    def connect(self, body: dict[str, object], sent: float = 1.0) -> socket.socket:
        """Send a request, or the first part of its body."""
        data = json.dumps(body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = self.live.connect()
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: int(len(data) * sent)])
        return connection

    @property
    def stats(self) -> EngineStats:
        return self.live.services.engine.stats

    @property
    def in_flight(self) -> int:
        return self.live.services.admission.in_flight

    def at_rest(self) -> bool:
        is_told = all(self.watch.ends[request_id] for request_id in self.watch.submitted)
        return is_told and is_at_rest(self.live) and not self.live.services.engine.num_live and not self.in_flight

    def start(self) -> Round:
        """What comes from here on is looked at together."""
        engine = self.live.engine
        return Round(self, len(self.watch.submitted), engine.events.emitted if engine else 0)


@dataclass
class Round:
    """The requests of one test."""

    bench: Bench
    first: int
    first_event: int

    @property
    def ids(self) -> list[str]:
        return self.bench.watch.submitted[self.first :]

    @property
    def num_ended(self) -> int:
        return sum(bool(self.bench.watch.ends[request_id]) for request_id in self.ids)

    @property
    def tokens(self) -> list[int]:
        return [self.bench.watch.num_tokens[request_id] for request_id in self.ids]

    def check(self, num_entered: int, reason: str) -> None:
        """All is over: each one ended once, for this reason, and was aborted once or not at all."""
        watch = self.bench.watch
        until(self.bench.at_rest, "something is left")
        assert len(self.ids) == len(set(self.ids)) == num_entered
        assert [watch.ends[request_id] for request_id in self.ids] == [[reason]] * num_entered
        assert {watch.num_aborts[request_id] for request_id in self.ids} <= {int(reason == "abort")}
        if self.bench.live.engine is not None:
            self.check_inside(self.bench.live.engine, "aborted" if reason == "abort" else "output_complete")

    def check_inside(self, engine: LLMEngine, last_stage: str) -> None:
        """By the engine's own records: one terminal event each, blocks free within two steps of the abort."""
        events = [e for e in engine.events.since(self.first_event) if isinstance(e, RequestEvent)]
        assert sorted((e.request_id, e.stage) for e in events if e.stage in LEFT_STAGES) == sorted(
            (request_id, last_stage) for request_id in self.ids
        )
        watch = self.bench.watch
        late = {r: (watch.aborted_at[r], watch.freed_at.get(r)) for r in self.ids if r in watch.aborted_at}
        assert all(freed is not None and freed - aborted <= 2 for aborted, freed in late.values()), late


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    server = {"max_queued_requests": 256, "max_queued_tokens": 10**6, "shutdown_timeout": 1.0}
    engine = {"num_blocks": 2048, "max_num_batched_tokens": 64, "max_num_seqs": 64, "check_invariants": True}
    with breakable(), running(**server, **engine) as live:
        watch = Watch(live)
        link = live.services.engine.link
        send = link.send

        def noting(message: ToEngine) -> None:
            watch.said(message)
            send(message)

        link.send = noting  # type: ignore[method-assign]
        live.services.engine.listeners.append(watch.heard)
        if live.engine is not None:
            look_after_steps(live.engine, watch)
        yield Bench(live, watch)


def look_after_steps(engine: LLMEngine, watch: Watch) -> None:
    step = engine.step

    def watched() -> list[object]:
        outputs = step()
        watch.look(engine)
        return outputs  # type: ignore[return-value]

    engine.step = watched  # type: ignore[method-assign,assignment]


def body(is_stream: bool, first: int = FAST, prompt_len: int = 20, max_tokens: int = ENDLESS) -> dict[str, object]:
    prompt = [first] + [7] * (prompt_len - 1)
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": is_stream}


def leave(connections: list[socket.socket], is_abrupt: bool) -> None:
    for connection in connections:
        if is_abrupt:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
class TestPoints:
    def test_before_tokenizing(self, bench: Bench, is_stream: bool) -> None:
        these = bench.start()
        connections = [bench.connect(body(is_stream), sent=0.5) for _ in range(TIMES)]
        until(lambda: bench.in_flight == TIMES, "the slots are not taken by the head alone")
        leave(connections, is_stream)
        until(bench.at_rest, "something is left")
        these.check(0, "abort")

    def test_while_queued(self, bench: Bench, is_stream: bool) -> None:
        blocking = bench.start()
        blockers = [bench.connect(body(False, SLOW)) for _ in range(64)]
        until(lambda: bench.stats.running == 64, "not all places are taken")
        these = bench.start()
        queued = [bench.connect(body(is_stream)) for _ in range(TIMES)]
        until(lambda: bench.stats.waiting == TIMES, "not all wait")
        leave(queued, is_stream)
        until(lambda: these.num_ended == TIMES, "those that waited are not gone")
        assert sum(these.tokens) == 0
        leave(blockers, False)
        blocking.check(TIMES + 64, "abort")

    def test_in_the_middle_of_prefill(self, bench: Bench, is_stream: bool) -> None:
        these, before = bench.start(), bench.stats.prefill_tokens
        long = [body(is_stream, SLOW, prompt_len=1500) | {"cache_salt": str(i)} for i in range(TIMES)]
        connections = [bench.connect(one) for one in long]
        until(lambda: bench.stats.prefill_tokens > before, "no chunk was computed")
        until(lambda: len(these.ids) == TIMES, "not all have entered")
        leave(connections, is_stream)
        these.check(TIMES, "abort")
        assert sum(these.tokens) < TIMES  # most of them had none yet

    def test_in_the_middle_of_decode(self, bench: Bench, is_stream: bool) -> None:
        these = bench.start()
        connections = [bench.connect(body(is_stream, SLOW)) for _ in range(TIMES)]
        until(lambda: len(these.ids) == TIMES and min(these.tokens) > 3, "not all decode")
        leave(connections, is_stream)
        these.check(TIMES, "abort")

    @thread_only("a plane whose loads take long is put beneath the engine; tests/engine/test_seams.py drives it too")
    def test_while_state_is_loaded(self, bench: Bench, is_stream: bool) -> None:
        assert bench.live.engine is not None
        scheduler, these = bench.live.engine.scheduler, bench.start()
        device = scheduler.kv
        plane = FakeStatePlane(device, lambda seq: Load(delay=200))  # type: ignore[arg-type]
        scheduler.kv = plane
        try:
            bodies = [body(is_stream, prompt_len=64) | {"cache_salt": f"load {is_stream} {i}"} for i in range(TIMES)]
            connections = [bench.connect(one) for one in bodies]
            until(lambda: plane.num_loads >= TIMES, "not all have asked for state")
            leave(connections, is_stream)
            until(lambda: bench.at_rest() and plane.is_settled(), "the loads have not ended")
        finally:
            scheduler.kv = device
        assert len(these.ids) == TIMES and all(len(bench.watch.ends[request_id]) == 1 for request_id in these.ids)

    def test_after_the_last_token(self, bench: Bench, is_stream: bool) -> None:
        these = bench.start()
        connections = [bench.connect(body(is_stream, max_tokens=5)) for _ in range(TIMES)]
        for connection in connections:
            seen = b""
            while b'"finish_reason":"length"' not in seen:
                piece = connection.recv(65536)
                assert piece, seen
                seen += piece
        leave(connections, is_stream)
        these.check(TIMES, "length")


def test_nothing_piles_up(bench: Bench) -> None:
    """Threads, file descriptors and tasks are as many after hundreds of vanished clients as before."""

    def counts() -> tuple[int, int]:
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(p.num_fds() for p in processes), threading.active_count() + sum(p.num_threads() for p in processes)

    def round_of_clients() -> None:
        connections = [bench.connect(body(i % 2 == 0)) for i in range(TIMES)]
        until(lambda: bench.stats.running > 0, "none runs")
        leave(connections, True)
        until(bench.at_rest, "something is left")

    round_of_clients()
    time.sleep(0.5)
    before = counts()
    for _ in range(4):
        round_of_clients()
    until(lambda: counts()[0] <= before[0] + 2 and counts()[1] <= before[1], f"from {before} to {counts()}")
    assert_alive(bench.live)
