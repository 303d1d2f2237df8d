"""Two servers, each its own process, share one Valkey or Redis: one computes, the other finds, neither needs it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis

from tests.serve.servers import CHAT, ServerProcess, until
from tests.state.servers import needs_server, running_server

Process = Callable[..., ServerProcess]
LESSON = "A block of sixteen tokens is found again by the digest of all that stands before it. " * 6
ALICE, BOB = {"Authorization": "Bearer key-a"}, {"Authorization": "Bearer key-b"}


def asked(server: ServerProcess, headers: dict[str, str] = ALICE) -> dict[str, Any]:
    messages = [{"role": "system", "content": LESSON}, {"role": "user", "content": "What is found again?"}]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": True, "ignore_eos": True}
    answer = server.ask("POST", CHAT, body, headers)
    assert answer.status == 200, answer.body
    return answer.json


def said(reply: dict[str, Any]) -> list[tuple[str, float]]:
    """Tokens and their probabilities, which are the same numbers in float32."""
    return [(one["token"], one["logprob"]) for one in reply["choices"][0]["logprobs"]["content"]]


def found(reply: dict[str, Any]) -> tuple[int, dict[str, int]]:
    usage = reply["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["nanovllm"]["hit_tokens_by_tier"]


@needs_server
def test_what_one_server_computed_is_a_hit_in_the_other(process: Process, tmp_path: Path) -> None:
    with running_server(tmp_path) as (url, valkey):
        flags = ("--state-remote", url, "--api-key", "alice:key-a", "--api-key", "bob:key-b", "--admin-key", "key-c")
        flags = (*flags, "--state-load", "always")
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(lambda _: process(*flags), range(2))
        cold = asked(first)
        blocks = cold["usage"]["prompt_tokens"] // 16
        with redis.Redis.from_url(url) as client:  # each block is a head and a part
            until(lambda: client.dbsize() >= 2 * blocks, "it is not written behind")
        shared = asked(second)
        tokens = (cold["usage"]["prompt_tokens"] - 1) // 16 * 16
        assert found(cold) == (0, {}) and found(shared) == (tokens, {"remote": tokens}) and tokens > 256
        assert said(shared) == said(cold)
        assert found(asked(second, BOB)) == (0, {}), "another tenant computes for itself"
        page = second.ask("GET", "/metrics", headers={"Authorization": "Bearer key-c"}).body.decode()
        (line,) = [one for one in page.splitlines() if "cached_tokens_total{" in one and 'cache_source="remote"' in one]
        assert float(line.rpartition(" ")[2]) == tokens
        valkey.kill()
        valkey.wait()
        for server in (first, second):
            for headers in (ALICE, BOB):
                assert said(asked(server, headers)) == said(cold)
            assert server.get("/health/ready").status == 200
