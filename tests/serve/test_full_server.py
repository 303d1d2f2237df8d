"""A full server refuses at once and keeps its books; deadlines; shares of tenants; whose cache is seen."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from nanovllm.serve.listener import with_files_for_connections
from tests.serve.servers import COMPLETIONS, Answer, LiveServer, assert_alive, read_all, read_head, until

Factory = Callable[..., LiveServer]
LONG = {"max_tokens": 900, "ignore_eos": True}
HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def promise(live: LiveServer, stack: ExitStack, key: str | None = None) -> socket.socket:
    """A request that was admitted and whose body does not come: it holds its slot."""
    before = live.services.admission.in_flight
    sock = stack.enter_context(live.connect())
    auth = f"Authorization: Bearer {key}\r\n" if key else ""
    sock.sendall(f"{HEAD}{auth}Content-Length: 300\r\n\r\n".encode())
    until(lambda: live.services.admission.in_flight == before + 1, "it was not admitted")
    return sock


def check_refusal(answer: Answer, status: int, code: str) -> None:
    assert (answer.status, answer.code) == (status, code)
    assert 1 <= int(answer.headers["retry-after"]) <= 30


def test_a_full_queue_is_said_before_the_body_is_read(server: Factory) -> None:
    live = server(max_queued_requests=2)
    with ExitStack() as stack:
        promise(live, stack)
        promise(live, stack)
        with live.connect() as third:
            third.sendall(f"{HEAD}Content-Length: 300\r\n\r\n".encode())  # and nothing more
            refused = read_head(third)
        assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in refused
        check_refusal(live.complete(), 503, "server_overloaded")
        assert live.get("/v1/models").status == 200  # what waits for nothing is served
        assert live.services.admission.rejected["server_overloaded"] >= 2
    assert_alive(live)  # clients that left gave their slots back


def test_queued_tokens_fill_the_queue(server: Factory) -> None:
    live = server(max_queued_tokens=150)
    with ExitStack() as stack:
        promise(live, stack)  # 300 bytes: 100 tokens
        check_refusal(live.complete("x" * 300), 503, "server_overloaded")
        assert live.complete("x").status == 200
    until(lambda: live.services.admission.in_flight == 0, "its slot is held")
    assert live.complete("x" * 600).status == 200  # alone it is taken
    assert_alive(live)


def test_an_estimate_is_corrected_when_the_prompt_is_known(server: Factory) -> None:
    live = server(max_queued_tokens=150)
    with ExitStack() as stack:
        promise(live, stack)
        body = json.dumps({"prompt": ["a" * 40, "b" * 40], "max_tokens": 1}).encode()  # 80 tokens
        assert len(body) // 3 <= 50  # by its length it would fit
        check_refusal(live.ask("POST", COMPLETIONS, body), 503, "server_overloaded")
    assert_alive(live)


def test_a_tenants_share_is_its_own(server: Factory) -> None:
    live = server(max_tenant_requests=2, api_key=("alice:key-a", "bob:key-b"))
    with ExitStack() as stack:
        promise(live, stack, "key-a")
        promise(live, stack, "key-a")
        check_refusal(live.complete(headers={"Authorization": "Bearer key-a"}), 429, "rate_limit_exceeded")
        assert live.complete(headers={"Authorization": "Bearer key-b"}).status == 200
        until(lambda: live.services.admission.in_flight == 2, "bob's answer holds its slot")
        promise(live, stack, "key-b")
        answer = live.complete(headers={"Authorization": "Bearer key-b"}, n=2, temperature=1)
        check_refusal(answer, 429, "rate_limit_exceeded")  # n counts n
        answer = live.complete(headers={"Authorization": "Bearer key-b"}, n=3, temperature=1)
        assert (answer.status, answer.json["error"]["param"]) == (400, "n")  # waiting would not help
    assert_alive(live)


def test_a_thousand_arrivals_get_answers_and_no_resets(fresh_server: Factory) -> None:
    live = fresh_server(max_queued_requests=16, max_num_seqs=4)
    with_files_for_connections(live.services.config)
    body = json.dumps({"prompt": "hello", "max_tokens": 8, "temperature": 0}).encode()
    request = f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def arrive() -> bytes:
        reader, writer = await asyncio.open_connection(live.host, live.port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()

    async def burst() -> list[bytes]:
        return await asyncio.wait_for(asyncio.gather(*(arrive() for _ in range(1000))), 120)

    answers = asyncio.run(burst())
    statuses = Counter(answer[9:12] for answer in answers)
    assert set(statuses) == {b"200", b"503"} and statuses[b"503"] > 100 and statuses[b"200"] >= 16, statuses
    for answer in answers:
        if answer[9:12] == b"503":
            assert b"retry-after: " in answer and b"server_overloaded" in answer
    assert live.services.admission.rejected["server_overloaded"] == statuses[b"503"]
    assert_alive(live)


def test_one_connection_too_many_is_told_so(server: Factory) -> None:
    live = server(max_connections=3)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(live.connect())
        until(lambda: live.get("/health").status == 503, "none too many")
        answer = live.get("/health")
        check_refusal(answer, 503, "server_overloaded")
        assert answer.headers["connection"] == "close"
    until(lambda: live.get("/health").status == 200, "the room did not come back")
    assert_alive(live)


def test_a_queue_too_long_to_wait_in(server: Factory) -> None:
    live = server(max_num_seqs=1, queue_timeout=0.2)
    answers: list[Answer] = []
    first = threading.Thread(target=lambda: answers.append(live.complete("first", **LONG)))
    first.start()
    until(lambda: live.services.engine.stats.running == 1, "the first did not start")
    late = live.complete("second")
    check_refusal(late, 503, "server_overloaded")
    first.join()
    assert answers[0].status == 200 and answers[0].json["usage"]["completion_tokens"] == 900
    assert_alive(live)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_too_long_to_wait_for(server: Factory, stream: bool) -> None:
    live = server(request_timeout=0.15)
    answer = live.complete("slow", stream=stream, n=8, temperature=1, **LONG)
    if stream and answer.status == 200:  # it had begun
        assert b'"code":"deadline_exceeded"' in answer.body and b"data: [DONE]" not in answer.body
    else:
        assert (answer.status, answer.code) == (504, "deadline_exceeded")
    until(lambda: live.services.engine.num_live == 0, "it lives on")


# -- attacks 31 and 32: whose cache is seen ---------------------------------------------------------

PROMPT = "The same long prompt, word for word, in every request of this test. " * 3


def cached(live: LiveServer, key: str, salt: str | None = None, prompt: str = PROMPT) -> int:
    more = {} if salt is None else {"cache_salt": salt}
    answer = live.complete(prompt, {"Authorization": f"Bearer {key}"}, **more)
    assert answer.status == 200, answer.body
    return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_key_sees_its_own_cache_only(fresh_server: Factory) -> None:
    live = fresh_server(api_key=("alice:key-a", "bob:key-b"), admin_key="key-c")
    assert cached(live, "key-a") == 0
    assert cached(live, "key-a") > 100
    assert cached(live, "key-b") == 0
    assert cached(live, "key-b") > 100
    assert cached(live, "key-c") == 0
    assert_alive(live)


def test_a_shared_prefix_is_seen_by_all(fresh_server: Factory) -> None:
    live = fresh_server(api_key=("alice:key-a", "bob:key-b"), share_prefix=True)
    assert cached(live, "key-a") == 0
    assert cached(live, "key-b") > 100
    assert_alive(live)


def test_a_salt_narrows(fresh_server: Factory) -> None:
    live = fresh_server(api_key=("alice:key-a", "bob:key-b"), share_prefix=True)
    assert cached(live, "key-a", "one") == 0
    assert cached(live, "key-a", "one") > 100
    assert cached(live, "key-a", "two") == cached(live, "key-b") == 0
    assert cached(live, "key-b", "one") > 100  # the salt and the namespace are all that is asked


FIELDS = ["namespace", "tenant", "user", "session_id", "previous_response_id", "prompt_cache_key"]


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_reaches_another_namespace(server: Factory, name: str) -> None:
    live = server(api_key=("alice:key-a", "bob:key-b"))
    prompt = f"{name} of his own comes with what Bob asks here, and nobody else ever did. " * 3
    bob, alice = ({"Authorization": f"Bearer key-{letter}"} for letter in "ba")
    own = live.complete(prompt, bob, **{name: "bob"})
    foreign = live.complete(prompt, alice, **{name: "bob"})
    assert own.status == foreign.status
    assert own.status == 400 or foreign.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# -- leaving and hurried clients --------------------------------------------------------------------


def test_clients_that_leave_give_everything_back(server: Factory) -> None:
    live = server(max_num_seqs=8)
    body = json.dumps({"prompt": "x", "stream": True, "temperature": 0, **LONG}).encode()
    request = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    for cut in (0, 10, len(request) // 2, len(request) - 1, len(request)):
        for _ in range(5):
            with live.connect() as sock:
                sock.sendall(request[:cut])
    for _ in range(10):
        with live.connect() as sock:
            sock.sendall(request)
            read_head(sock)
    assert_alive(live)


def test_pipelined_requests_are_answered_in_turn(server: Factory) -> None:
    live = server()
    one = b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: %d\r\n"
    data = b"".join(one % i + b"\r\n" for i in range(9)) + one % 9 + b"Connection: close\r\n\r\n"
    with live.connect() as sock:
        sock.sendall(data)
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200 ") == 10
    places = [answer.index(b"x-request-id: %d" % i) for i in range(10)]
    assert places == sorted(places)
    assert_alive(live)
