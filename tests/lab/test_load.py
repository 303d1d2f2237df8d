"""The load generator over a real socket: what arrives, what misbehaving servers become, when requests are sent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nanovllm.errors import ConfigError, RemoteError
from nanovllm.lab import load
from nanovllm.lab.address import Address
from nanovllm.lab.client import list_models
from nanovllm.lab.load import Plan, send
from nanovllm.lab.outcome import Outcome, judge
from tests.lab.scripted_server import (
    DONE,
    HANG,
    ROLE,
    ScriptedServer,
    Seen,
    Step,
    answer,
    event,
    head,
    piece,
    refusal,
    usage,
)

LONG_S = 60.0
EURO = "€".encode()


def outcomes(script: Callable[[Seen], Iterable[Step]], count: int = 1, **plan: Any) -> list[Outcome]:
    """Send `count` requests in a closed loop of one, unless the plan says otherwise."""
    settings = {"timeout_s": LONG_S, **({"concurrency": 1} if "arrivals_ns" not in plan else {}), **plan}
    with ScriptedServer(script) as server:
        run = send(Address.parse(server.url), Plan("/v1/completions", [{"n": n} for n in range(count)], **settings))
        assert run.server in ("scripted", "") and len(run.exchanges) == count
    return [judge(exchange) for exchange in run.exchanges]


def test_times_and_tokens_of_a_slow_answer() -> None:
    (found,) = outcomes(lambda seen: answer("one", "two", "three", cached=2, first_s=0.2, gap_s=0.05))
    assert (found.verdict, found.reason, found.output_tokens, len(found.text_ns)) == ("completed", "stop", 3, 3)
    assert found.usage.cached_tokens == 2
    assert found.ttft_ns >= 0.2e9  # the server waits this long after the request came
    assert found.e2e_ns >= 0.35e9  # and this long in all before the finish reason
    assert sum(found.gaps_ns) + found.ttft_ns <= found.e2e_ns <= found.ended_ns - found.sent_ns


def chunked(*parts: bytes) -> list[bytes]:
    frames = [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts]
    return [head("200 OK", "text/event-stream", "Transfer-Encoding: chunked"), *frames]


def cut_at(stream: bytes, mark: bytes) -> list[Step]:
    """The stream in two parts, with time between them, the cut one byte into `mark`."""
    at = stream.index(mark) + 1
    return [head(), stream[:at], 0.05, stream[at:]]


WHOLE = piece("a") + piece("€") + piece("", "stop") + usage(1, 2) + DONE
ODD_BUT_FINE = {
    "all in one chunk": [head() + WHOLE],
    "cut inside an escape": cut_at(WHOLE, b"u20ac"),
    "cut inside a character": cut_at(WHOLE.replace(rb"\u20ac", EURO), EURO),
    "comments between": [head(), b": ping\n\n", piece("a"), b": ping\n\n", piece("b", "stop") + usage(1, 2), DONE],
    "no DONE": [head(), piece("a"), piece("b", "stop"), usage(1, 2)],
    "chunked": [*chunked(ROLE, WHOLE), b"0\r\n\r\n"],
    "CR LF": [head(), WHOLE.replace(b"\n", b"\r\n")],
    "never closes": [head(), WHOLE, HANG],
}


@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_odd_servers_that_answer(name: str) -> None:
    (found,) = outcomes(lambda seen: ODD_BUT_FINE[name], timeout_s=5.0 if name == "never closes" else LONG_S)
    assert (found.verdict, found.output_tokens, len(found.text_ns)) == ("completed", 2, 2)


FAILING: dict[str, tuple[list[Step], str, str]] = {
    "503": (refusal("503 Service Unavailable", "full"), "rejected", "503"),
    "429": (refusal("429 Too Many Requests", "slower"), "rejected", "429"),
    "400": (refusal("400 Bad Request", "no"), "failed", "http_400"),
    "redirect": ([head("307 Temporary Redirect", "text/html", "Location: http://127.0.0.1:1/")], "failed", "http_307"),
    "cut": ([head(), ROLE, piece("a")], "failed", "cut"),
    "cut in an event": ([head(), piece("a")[:-5]], "failed", "cut"),
    "cut in a chunk": (chunked(piece("a")), "failed", "cut"),
    "closed at once": ([], "failed", "cut"),
    "no HTTP": ([b"\x00\x01SSH-2.0\r\n\r\n"], "failed", "cut"),
    "HTML": ([head("200 OK", "text/html"), b"<html>"], "failed", "not_sse"),
    "JSON instead of a stream": ([head("200 OK", "application/json"), b"{}"], "failed", "not_sse"),
    "no JSON": ([head(), event(b"<html>")], "failed", "not_json"),
    "error event": ([head(), ROLE, piece("a"), event({"error": {"code": "draining"}})], "failed", "draining"),
    "never answers": ([HANG], "failed", "timeout"),
    "stops in the middle": ([head(), ROLE, piece("a"), HANG], "failed", "timeout"),
    "pings for ever": ([head(), *[b": ping\n\n", 0.05] * 2000], "failed", "timeout"),
}


@pytest.mark.parametrize("name", FAILING)
def test_misbehaving_servers(name: str) -> None:
    """Each becomes one outcome with its reason, and the request after it is answered as if nothing had been."""
    steps, verdict, reason = FAILING[name]
    if reason == "timeout":
        (found,) = outcomes(lambda seen: steps, timeout_s=1.0)
    else:
        found, after = outcomes(lambda seen: steps if seen.number == 0 else answer("fine"), 2)
        assert after.verdict == "completed"
    assert (found.verdict, found.reason) == (verdict, reason)


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_ANSWER_BYTES", 10_000)
    (found,) = outcomes(lambda seen: [head(), *[piece("a")] * 10_000])
    assert (found.verdict, found.reason) == ("failed", "too_long")


def test_nobody_there() -> None:
    with ScriptedServer(lambda seen: []) as server:
        address = Address.parse(server.url)
    (exchange,) = send(address, Plan("/", [{}], LONG_S, concurrency=1)).exchanges
    assert (judge(exchange).verdict, judge(exchange).reason) == ("failed", "refused")
    with pytest.raises(RemoteError, match="nanovllm serve"):
        list_models(address)


def test_an_open_loop_sends_while_earlier_ones_wait() -> None:
    """Nothing is answered until all are there: a client that waited for answers would time out."""
    server: ScriptedServer

    def script(seen: Seen) -> Iterable[Step]:
        while len(server.posts()) < 5:
            yield 0.01
        yield from answer("a")

    with ScriptedServer(script) as server:
        arrivals_ns = [0, 0, 10**8, 10**8, 2 * 10**8]
        run = send(Address.parse(server.url), Plan("/x", [{}] * 5, LONG_S, arrivals_ns=arrivals_ns))
    found = [judge(exchange) for exchange in run.exchanges]
    assert {o.verdict for o in found} == {"completed"}
    assert all(o.late_ns >= 0 for o in found)  # never before its time
    start_ns = run.exchanges[0].due_ns
    assert [exchange.due_ns - start_ns for exchange in run.exchanges] == arrivals_ns


def test_a_closed_loop_keeps_its_concurrency() -> None:
    ended = []
    with ScriptedServer(lambda seen: answer("a", first_s=0.1)) as server:
        plan = Plan("/x", [{"n": n} for n in range(10)], LONG_S, concurrency=3)
        run = send(Address.parse(server.url), plan, lambda: ended.append(1))
    assert server.most_under_way <= 3 and len(ended) == 10
    assert all(judge(exchange).late_ns is None for exchange in run.exchanges)
    assert sorted(seen.body["n"] for seen in server.posts()) == list(range(10))
    starts_and_ends = [(e.sent_ns, 1) for e in run.exchanges] + [(e.ended_ns, -1) for e in run.exchanges]
    under_way = [sum(step for at, step in starts_and_ends if at <= now) for now, _ in starts_and_ends]
    assert max(under_way) == 3


def test_without_aiohttp_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ConfigError, match='pip install "aiohttp'):
        send(Address.parse("http://127.0.0.1:1"), Plan("/", [{}], 1.0, concurrency=1))
