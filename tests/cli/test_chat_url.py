"""`nanovllm chat --url`: the conversation over HTTP, its failures, and what Ctrl-C tells the server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest

from tests.lab.scripted_server import (
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
)
from tests.terminal import read_until

Run = Callable[..., subprocess.CompletedProcess[str]]
CHAT = ("chat", "--url")


def echo(seen: Seen) -> Iterable[Step]:
    """Say how many messages there were, and repeat the last."""
    messages = seen.body["messages"]
    return answer(f"{len(messages)}: ", messages[-1]["content"], cached=3, first_s=0.1)


def test_history_goes_with_each_message(command: Run) -> None:
    with ScriptedServer(echo) as server:
        done = command(*CHAT, server.url, "--system", "Be brief.", stdin="one\ntwo\n/reset\nthree\n")
    assert (done.returncode, done.stdout) == (0, "2: one\n4: two\n2: three\n")
    assert "forgotten" in done.stderr
    second = server.posts()[1].body
    said = [(message["role"], message["content"]) for message in second["messages"]]
    assert said == [("system", "Be brief."), ("user", "one"), ("assistant", "2: one"), ("user", "two")]


def test_what_is_sent(nanovllm: Run) -> None:
    flags = ("--temperature", "0.5", "--stop", "END", "--max-tokens", "9", "--seed", "0", "--ignore-eos")
    with ScriptedServer(echo, models=["first", "second"]) as server:
        nanovllm(*CHAT, server.url + "/v1", *flags, stdin="hi\n", NANOVLLM_API_KEY="sesame")
        nanovllm(*CHAT, server.url, "--model", "second", stdin="hi\n")
    bodies = [dict(seen.body) for seen in server.posts()]
    always = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hi"}],
    }
    given = {"temperature": 0.5, "stop": ["END"], "max_tokens": 9, "seed": 0, "ignore_eos": True}
    assert bodies[0] == {"model": "first", **given, **always}
    assert bodies[1] == {"model": "second", "temperature": 0.0, "max_tokens": 256, **always}
    assert [seen.headers.get("authorization") for seen in server.seen] == ["Bearer sesame"] * 2 + [None]


def test_timeline_is_the_clients(nanovllm: Run) -> None:
    with ScriptedServer(echo) as server:
        done = nanovllm(*CHAT, server.url, stdin="/timeline\none\n/timeline\n/reset\n/timeline\n")
    assert done.stderr.count("There is no answer yet.") == 2
    assert "5 prompt tokens; 3 cached; 2 tokens; finish_reason stop" in done.stderr
    ttft_ms = re.search(r"TTFT ([\d,.]+) ms.* \(measured by this client", done.stderr)[1]
    assert float(ttft_ms) >= 100


def test_control_characters_and_cut_characters(nanovllm: Run) -> None:
    """Raw UTF-8 cut between two reads is put together; a pipe gets the text as it is."""
    stream = piece("§").replace(rb"\u00a7", "§".encode())
    at = stream.index("§".encode()) + 1
    steps = [head(), stream[:at], 0.05, stream[at:], piece("", "stop")]
    with ScriptedServer(lambda seen: steps) as server:
        assert nanovllm(*CHAT, server.url, stdin="x\n").stdout == "§\n"


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        (refusal("400 Bad Request", "The prompt is too long."), 2, "The server answered: The prompt is too long."),
        (refusal("503 Service Unavailable", "Draining."), 1, "The server answered: Draining."),
        (refusal("401 Unauthorized", "No key."), 1, "Give a key with --api-key or NANOVLLM_API_KEY."),
        ([head("502 Bad Gateway", "text/html"), b"<html>"], 1, "answered 502 Bad Gateway."),
        ([head(), ROLE, piece("half")], 1, "closed the connection in the middle"),
        ([head(), ROLE, event({"error": {"message": "A step failed."}})], 1, "The server answered: A step failed."),
        ([head(), event(b"nonsense")], 1, "no JSON object"),
        ([head("200 OK", "application/json"), b"{}"], 1, "did not stream"),
        ([b"nonsense\r\n\r\n"], 1, "broke"),
        ([b"HTTP/1.1 200 " + b"x" * 70_000], 1, "broke"),
        ([], 1, "broke"),
    ],
)
def test_failures_are_one_sentence(nanovllm: Run, steps: list[Step], code: int, words: str) -> None:
    with ScriptedServer(lambda seen: steps) as server:
        done = nanovllm(*CHAT, server.url, stdin="hi\nnever said\n")
    assert done.returncode == code and words in done.stderr and done.stderr.count("\n") == 1
    assert len(server.posts()) == 1


def test_a_server_that_is_silent_for_too_long(nanovllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.lab.client.SILENCE_S", 0.5)
    with ScriptedServer(lambda seen: [head(), HANG]) as server:
        done = nanovllm(*CHAT, server.url, stdin="hi\n")
    assert done.returncode == 1 and "did not answer for 0.5 s" in done.stderr


def test_nobody_there(command: Run) -> None:
    with ScriptedServer(echo) as server:
        pass
    done = command(*CHAT, server.url, stdin="hi\n")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "Start one with: nanovllm serve" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("smollm2", "--url", "http://127.0.0.1:1"), "Write --model smollm2."),
        (("--model", "smollm2"), "Write nanovllm chat smollm2."),
        (("--url", "http://127.0.0.1:1", "--block-size", "32"), "--block-size has no effect on a server"),
        (("--url", "http://127.0.0.1:1", "--log", "stage"), "--log has no effect on a server"),
        (("--url", "127.0.0.1"), "Write it like http://127.0.0.1:8000."),
        (("--url", "http://127.0.0.1:1", "--api-key", "a b"), "api_key must be ASCII"),
    ],
)
def test_flags_that_cannot_be_meant(nanovllm: Run, arguments: tuple[str, ...], words: str) -> None:
    done = nanovllm("chat", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr


def test_it_needs_no_torch_and_no_aiohttp() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'aiohttp')))"
    code = f"{block}; from nanovllm.cli.main import main; main()"
    with ScriptedServer(echo) as server:
        call = [sys.executable, "-c", code, *CHAT, server.url]
        done = subprocess.run(call, input=b"hi\n", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"1: hi\n"), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_closes_the_connection_and_the_conversation_goes_on(
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    def script(seen: Seen) -> Iterable[Step]:
        return [head(), ROLE, piece("endless"), HANG] if seen.number == 0 else echo(seen)

    ours, theirs = os.openpty()
    with ScriptedServer(script) as server:
        process = start(*CHAT, server.url, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        read_until(ours, b"> ")
        os.write(ours, b"hello\n")
        read_until(ours, b"endless")
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in read_until(ours, b"(stopped)")
        assert server.gone.wait(60)  # the server saw it, and can free the request's blocks
        os.write(ours, b"again\n")
        read_until(ours, b"3: again")
        os.write(ours, b"/exit\n")
        assert process.wait(60) == 0
    os.close(ours)
    said = [message["content"] for message in server.posts()[1].body["messages"]]
    assert json.dumps(said) == '["hello", "endless", "again"]'
