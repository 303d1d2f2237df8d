"""`nanovllm bench serve` as a user meets it: stdout, exit codes, and nothing dropped silently."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.scripted_server import ScriptedServer, Seen, Step, answer, refusal

Run = Callable[..., subprocess.CompletedProcess[str]]
BENCH = ("bench", "serve", "--url")


def fine(seen: Seen) -> Iterable[Step]:
    return answer("one", " two", " three", cached=4)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_ends_with_one_json_document(command: Run) -> None:
    with ScriptedServer(fine) as server:
        arguments = ("--num-requests", "4", "--concurrency", "2", "--warmup", "2", "--slo", "ttft:60000")
        done = command(*BENCH, server.url, *arguments, "--api-key", "sesame")
    found = document(done)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar where stderr is no terminal
    assert found["label"] == "measured" and found["settings"]["model"] == "scripted"
    assert found["versions"]["server_header"] == "scripted" and "nanovllm" in found["versions"]
    assert found["requests"]["completed"] == 4 and found["requests"]["finish_reasons"] == {"stop": 4}
    assert found["warmup"] == {"requests": 2, "not_completed": 0} and len(server.posts()) == 6
    tokens = found["tokens"]
    assert (tokens["prompt"], tokens["output"], tokens["cached"]) == (20, 12, 16)
    assert found["goodput"]["requests"] == 4
    assert [found["latency_ms"][name]["count"] for name in ("ttft", "tpot", "itl", "e2e")] == [4, 4, 8, 4]
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer sesame"}
    assert "sesame" not in done.stdout
    for word in ("TTFT", "TPOT", "ITL", "E2E", "goodput", "4 completed (stop: 4)", "throughput", "client"):
        assert word in done.stdout


def test_json_alone_and_the_same_seed_sends_the_same(nanovllm: Run) -> None:
    sent = []
    for seed in ("7", "7", "8"):
        with ScriptedServer(fine) as server:
            arguments = ("--endpoint", "completions", "--request-rate", "1000", "--seed", seed, "--num-requests", "5")
            done = nanovllm(*BENCH, server.url, *arguments, "--range-ratio", "0.5", "--json", "--model", "m")
        assert done.stdout.count("\n") == 1 and document(done)["settings"]["request_rate"] == 1000.0
        assert all(seen.path == "/v1/completions" for seen in server.seen)  # --model: nothing to ask first
        sent.append(sorted((seen.body["prompt"], seen.body["max_tokens"]) for seen in server.posts()))
    assert sent[0] == sent[1] != sent[2]


def test_a_workload_of_the_lab_is_sent(nanovllm: Run) -> None:
    with ScriptedServer(fine) as server:
        arguments = ("--workload", "rag", "--num-requests", "4", "--concurrency", "2", "--warmup", "1", "--json")
        done = nanovllm(*BENCH, server.url, *arguments)
    found = document(done)
    assert done.returncode == 0 and found["requests"]["completed"] == 4 and len(server.posts()) == 5
    assert found["settings"]["workload"] == "rag" and found["settings"]["knobs"]["documents"] == 3
    texts = [seen.body["messages"][0]["content"] for seen in server.posts()]
    begins = [text.split()[:32] for text in texts]
    assert begins[0] != begins[1] == begins[2]  # the warm-up has a system prompt of its own


def test_rejections_are_no_failure_of_the_run(nanovllm: Run) -> None:
    def script(seen: Seen) -> Iterable[Step]:
        refused = {0: "503 Service Unavailable", 1: "429 Too Many Requests"}.get(seen.number)
        return fine(seen) if refused is None else refusal(refused, "full")

    with ScriptedServer(script) as server:
        done = nanovllm(*BENCH, server.url, "--num-requests", "5", "--concurrency", "1")
    requests = document(done)["requests"]
    assert done.returncode == 0 and requests["rejected_by_status"] == {"429": 1, "503": 1}
    assert (requests["sent"], requests["completed"], requests["failed"]) == (5, 3, 0)
    assert "2 rejected (429: 1, 503: 1)" in done.stdout


def test_a_failure_is_counted_shown_and_the_exit_code(nanovllm: Run) -> None:
    with ScriptedServer(lambda seen: fine(seen) if seen.number else refusal("500 Oops", "broken")) as server:
        done = nanovllm(*BENCH, server.url, "--num-requests", "3", "--concurrency", "1")
    requests = document(done)["requests"]
    assert done.returncode == 1 and requests["failed_by_reason"] == {"http_500": 1} and requests["completed"] == 2
    assert "1 failed (http_500: 1)" in done.stdout


def test_prompts_of_a_file_are_sent_in_order(nanovllm: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('first\n{"prompt": "second", "max_tokens": 3}\n')
    with ScriptedServer(fine) as server:
        done = nanovllm(*BENCH, server.url, "--prompts", str(file), "--concurrency", "1", "--output-len", "9")
    assert done.returncode == 0
    said = [(seen.body["messages"][0]["content"], seen.body["max_tokens"]) for seen in server.posts()]
    assert said == [("first", 9), ("second", 3)]


def test_nobody_there(command: Run) -> None:
    with ScriptedServer(fine) as server:
        pass
    done = command(*BENCH, server.url)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert server.url in done.stderr and "Start one with: nanovllm serve" in done.stderr


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (lambda seen: refusal("401 Unauthorized", "No key."), "The server answered: No key. Give a key with --api-key"),
        (lambda seen: [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"], "no OpenAI-compatible server"),
        (lambda seen: [b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + b'{"data":[]}'], "lists no model"),
        (lambda seen: refusal("404 Not Found", "Nothing here."), "Name one with --model NAME."),
        (lambda seen: [], "broke"),
    ],
)
def test_a_server_that_does_not_list_its_model(
    nanovllm: Run, monkeypatch: pytest.MonkeyPatch, script: Callable[[Seen], Iterable[Step]], words: str
) -> None:
    with ScriptedServer(fine) as server:
        monkeypatch.setattr("tests.lab.scripted_server.models", lambda names: script(server.seen[0]))
        done = nanovllm(*BENCH, server.url)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1 and words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--request-rate", "-1"), "request_rate must be above 0"),
        (("--request-rate", "2", "--concurrency", "2"), "contradict"),
        (("--slo", "speed:5"), "slo cannot be read from 'speed:5'"),
        (("--prompts", "/nowhere/prompts.txt"), "cannot be read"),
        (("--url", "127.0.0.1:8000"), "http://"),
        (("--num-requests", "0"), "--num-requests"),
        (("--endpoint", "embeddings"), "--endpoint"),
    ],
)
def test_bad_input(nanovllm: Run, arguments: tuple[str, ...], words: str) -> None:
    done = nanovllm("bench", "serve", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr
