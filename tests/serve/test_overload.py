"""Too many at once, and for long: bursts, faults under load, and a soak of aborts and nonsense."""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2 as httpx
import psutil
import pytest

from tests.serve.breakable import FAULTY, STALLING, breakable
from tests.serve.servers import LiveServer, assert_alive, read_head, until
from tests.serve.surface import Live, live_server

QUEUE, RUNNING, ARRIVALS = 128, 8, 1000
ASKERS = 16


@pytest.fixture
def small() -> Iterator[Live]:
    """A server with a short queue."""
    server = {"max_queued_requests": QUEUE, "queue_timeout": 240.0, "shutdown_timeout": 5.0, "max_queued_tokens": 10**6}
    engine = {"num_blocks": 1024, "max_num_seqs": RUNNING, "event_capacity": 1024}
    with breakable(), live_server(**server, **engine) as live:
        yield live


def in_parallel(work: Callable[[int], None], count: int, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(count)))


def test_a_burst_is_answered_to_the_last_arrival(small: Live) -> None:
    """L2: 1,000 arrivals, 128 places: every accepted request finishes, every other one is told when to come again."""
    answers: Counter[str] = Counter()
    lock, barrier = threading.Lock(), threading.Barrier(100)
    body = {"prompt": [5] * 16, "max_tokens": 16, "ignore_eos": True, "temperature": 0}

    def ask(_: int) -> None:
        with httpx.Client(base_url=small.url, timeout=120, verify=False) as client:
            barrier.wait(60)
            for _ in range(ARRIVALS // 100):
                answer = client.post("/v1/completions", json=body)
                what = str(answer.status_code)
                if answer.status_code == 200:
                    assert answer.json()["usage"]["completion_tokens"] == 16
                else:
                    assert answer.json()["error"]["code"] == "server_overloaded"
                    assert 1 <= int(answer.headers["retry-after"]) <= 30
                with lock:
                    answers[what] += 1

    in_parallel(ask, 100, 100)
    assert answers["200"] + answers["503"] == ARRIVALS and answers["200"] >= QUEUE // 2, answers
    assert_alive(small.server)


def test_a_full_queue_refuses_before_the_body_is_sent(small: Live) -> None:
    """With every place taken a refusal needs no body."""
    admission = small.services.admission
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 300\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(QUEUE):
            stack.enter_context(small.server.connect()).sendall(head)
        until(lambda: admission.queued_requests == QUEUE, "the queue is not full")
        with small.server.connect() as late:
            late.sendall(head)
            answer = read_head(late)
    assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer.lower()
    assert_alive(small.server)


def test_a_bad_step_fails_its_requests_and_the_next_one_is_good(small: Live) -> None:
    """A6: a fault in the forward pass is a 500 with a request id and no internals; the server goes on."""
    for _ in range(2):
        answer = small.complete([FAULTY, 1], max_tokens=4)
        assert answer.status_code == 500 and "0x7f" not in answer.text
        assert answer.headers["x-request-id"] in answer.text
        assert small.complete([1], max_tokens=4).status_code == 200
    assert_alive(small.server)


def test_a_bad_step_in_a_stream_is_its_last_event(small: Live) -> None:
    with small.http.stream("POST", "/v1/completions", json={"prompt": [FAULTY], "stream": True}) as answer:
        text = answer.read().decode()
    assert answer.status_code == 500 and "[DONE]" not in text and "0x7f" not in text
    assert_alive(small.server)


def test_a_step_that_hangs_holds_no_request_past_its_deadline(server: Callable[..., LiveServer]) -> None:
    """A7: 504 while the step still runs; nothing is left when it has ended."""
    with breakable():
        live = server(request_timeout=0.5, max_num_seqs=4)
    stuck = live.services.engine.stats.steps
    answer = live.complete([STALLING, 1])
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    assert live.services.engine.stats.steps == stuck  # it has not come back yet
    assert live.get("/health").status == 200
    until(lambda: live.services.engine.stats.steps > stuck, "the step does not end")
    assert_alive(live)


def test_three_bad_steps_in_a_row_make_the_server_unhealthy(small: Live) -> None:
    """It says so, and goes on answering 503."""
    statuses = [small.complete([FAULTY]).status_code for _ in range(6)]
    assert set(statuses[:3]) <= {500, 503} and set(statuses[4:]) == {503}, statuses
    assert small.http.get("/health").status_code == 503
    assert small.http.get("/health/ready").status_code == 503
    error = small.chat(max_tokens=4).json()["error"]
    assert error["code"] == "engine_unhealthy"


def soak(live: Live, count: int, rng: random.Random) -> Counter[str]:
    """Requests of which 30 % are left early and 5 % are nonsense; what became of them."""
    outcomes: Counter[str] = Counter()
    plans = [(rng.random(), rng.randrange(1, 200), rng.randrange(1, 40), rng.random() < 0.5) for _ in range(count)]
    nonsense = (b"{", b"[]", b'{"prompt": 7}', b'{"prompt": "x", "n": 1000000}', b"\xff\xfe", b'{"max_tokens": -1}')

    def ask(i: int) -> None:
        chance, prompt_len, max_tokens, is_stream = plans[i]
        with httpx.Client(base_url=live.url, timeout=60, verify=False) as client:
            if chance < 0.05:
                headers = {"content-type": "application/json"}
                answer = client.post("/v1/completions", content=nonsense[i % len(nonsense)], headers=headers)
                outcomes[f"nonsense {answer.status_code}"] += 1
                return
            body = {
                "prompt": [i % 200 + 1] * prompt_len,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": is_stream,
            }
            with client.stream("POST", "/v1/completions", json=body) as answer:
                if chance < 0.35:
                    next(iter(answer.iter_raw()), b"") if is_stream else None
                    outcomes["left"] += 1
                    return
                answer.read()
                outcomes[f"whole {answer.status_code}"] += 1

    in_parallel(ask, count, ASKERS)
    return outcomes


def resources() -> tuple[int, int, int]:
    """Bytes, files and threads of this process and of those that engines run in."""
    gc.collect()
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return (
        sum(process.memory_info().rss for process in processes),
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
    )


def check_soak(live: Live, rounds: int, per_round: int) -> None:
    rng = random.Random(3)
    soak(live, per_round, rng)  # warm: pools, caches, the allocator's own
    before = resources()
    total: Counter[str] = Counter()
    for _ in range(rounds):
        total += soak(live, per_round, rng)
    assert set(total) <= {"nonsense 400", "left", "whole 200"}, total
    assert total["left"] > 0.2 * rounds * per_round and total["nonsense 400"] > 0
    assert_alive(live.server)  # every block is free again
    after = resources()
    assert after[0] - before[0] < 32 * 2**20, (before, after)
    assert after[1] <= before[1] + 4 and after[2] <= before[2] + 2, (before, after)


def test_a_short_soak_leaves_nothing(small: Live) -> None:
    check_soak(small, rounds=1, per_round=150)


@pytest.mark.long
def test_a_soak_of_two_thousand_leaves_nothing(small: Live) -> None:
    check_soak(small, rounds=8, per_round=250)
