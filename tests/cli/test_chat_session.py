"""`nanovllm chat --session NAME`: a conversation that goes on in another process, here and on a server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nanovllm.cli.flags import Setup
from nanovllm.cli.kept_chat import kept_setup
from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from tests.serve.servers import LiveServer, running
from tests.terminal import read_until

Run = Callable[..., subprocess.CompletedProcess[str]]
CHAT = ("chat", "tiny:random", "--max-tokens", "6", "--dtype", "float32")
FOUND = re.compile(r"(\d+) of (\d+) prompt tokens were cached(?: \((.*?)\))?\.")


def found_in(done: subprocess.CompletedProcess[str]) -> list[tuple[int, int, str]]:
    return [(int(cached), int(prompt), where) for cached, prompt, where in FOUND.findall(done.stderr)]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with running(num_blocks=512) as live:
        yield live


def test_it_goes_on_where_it_stopped(nanovllm: Run, tmp_path: Path) -> None:
    flags = (*CHAT, "--session", "ada", "--state-dir", str(tmp_path), "--state-load", "always", "--block-size", "8")
    first = nanovllm(*flags, stdin="one, two and three\nfour\n")
    assert first.returncode == 0 and "Session ada is new" in first.stderr
    again = nanovllm(*flags, stdin="five\n")
    kept = re.search(r"Session ada goes on: 4 messages, (\d+) tokens", again.stderr)
    assert kept is not None
    [(cached, prompt, where)] = found_in(again)
    assert prompt > int(kept[1]) > cached > found_in(first)[1][0] > 0 and where == f"disk {cached}"
    unbroken = (*CHAT, "--session", "eve", "--state-dir", str(tmp_path))
    whole = nanovllm(*unbroken, stdin="one, two and three\nfour\nfive\n")
    assert whole.stdout == first.stdout + again.stdout, "a kept conversation answers as one that never stopped"
    other = nanovllm(*CHAT, "--session", "bob", "--state-dir", str(tmp_path), "--quiet", stdin="one\n")
    assert other.returncode == 0 and other.stderr == ""


def test_reset_drops_what_was_kept(nanovllm: Run, tmp_path: Path) -> None:
    flags = (*CHAT, "--session", "ada", "--state-dir", str(tmp_path))
    nanovllm(*flags, stdin="one\n/reset\ntwo\n")
    assert "goes on: 2 messages" in nanovllm(*flags, stdin="").stderr


def test_the_folder_is_in_the_cache_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    monkeypatch.delenv("NANOVLLM_STATE_DIR", raising=False)
    assert kept_setup("tiny:random", Setup({})).settings == {"state_dir": str(tmp_path / "sessions")}
    named = Setup({"state_dir": "elsewhere"})
    assert kept_setup("tiny:random", named) is named


@pytest.mark.parametrize("name", ["", "a@b", "conv_1", "resp_1", "x" * 129, "a\nb"])
def test_a_name_that_cannot_be(nanovllm: Run, tmp_path: Path, name: str) -> None:
    done = nanovllm(*CHAT, "--session", name, "--state-dir", str(tmp_path), stdin="x\n")
    assert done.returncode == 2 and "session" in done.stderr


def test_a_folder_that_is_in_use_says_so(nanovllm: Run, tmp_path: Path) -> None:
    with running(state_dir=str(tmp_path), num_blocks=64):
        done = nanovllm(*CHAT, "--session", "ada", "--state-dir", str(tmp_path), stdin="x\n")
    assert done.returncode != 0 and str(tmp_path) in done.stderr


def test_on_a_server_by_its_name(nanovllm: Run, server: LiveServer, tmp_path: Path) -> None:
    flags = ("chat", "--url", server.server.url, "--session", "ada lovelace", "--max-tokens", "6", "--ignore-eos")
    first = nanovllm(*flags, "--system", "Be brief.", stdin="one, two and three\nfour\n")
    assert first.returncode == 0 and "Session ada lovelace is new" in first.stderr
    again = nanovllm(*flags, "--system", "Be brief.", stdin="five\n/timeline\n")
    assert "goes on: 4 messages" in again.stderr and "finish_reason length" in again.stderr
    [(cached, prompt, where)] = found_in(again)
    assert 0 < cached < prompt and where == f"device {cached}"
    here = (*CHAT, "--session", "x", "--state-dir", str(tmp_path), "--ignore-eos", "--system", "Be brief.")
    local = nanovllm(*here, stdin="one, two and three\nfour\nfive\n")
    assert first.stdout + again.stdout == local.stdout
    nanovllm(*flags, stdin="/reset\nsix\n")
    assert "goes on: 2 messages" in nanovllm(*flags, stdin="").stderr


def test_a_folder_is_the_same_to_both(nanovllm: Run, tmp_path: Path) -> None:
    """What the terminal began, a server goes on with, and the other way round."""
    local = (*CHAT, "--session", "both", "--state-dir", str(tmp_path))
    nanovllm(*local, stdin="one\n")
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        remote = ("chat", "--url", live.server.url, "--session", "both", "--max-tokens", "6")
        assert "goes on: 2 messages" in nanovllm(*remote, stdin="two\n").stderr
        [talk] = live.get("/v1/conversations?name=both").json["data"]
        assert live.ask("POST", f"/v1/conversations/{talk['id']}", {"metadata": {"topic": "herons"}}).status == 200
    assert "goes on: 4 messages" in nanovllm(*local, stdin="three\n").stderr
    shown = nanovllm("state", "show", "both", "--state-dir", str(tmp_path), "--json").stdout
    assert json.loads(shown)["content"]["facts"]["metadata"] == {"topic": "herons"}, "what a client wrote stays"


def test_what_is_no_conversation_of_chats_says_how_to_go_on(nanovllm: Run, tmp_path: Path) -> None:
    """A session of the state plane, and a conversation with calls."""
    call = {"type": "function_call", "id": "fc", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"}
    with StateStore.open(tmp_path) as store:
        store.put([{"role": "user", "content": "x"}], {"name": "plain", "kind": "session"})
        store.put(Session([call], (), {"object": "conversation"}), {"name": "called", "kind": "session"})
        store.put(Session([{"role": "user"}], (), {"object": "conversation"}), {"name": "odd", "kind": "session"})
    for name, mend in (
        ("plain", "nanovllm state show plain"),
        ("odd", "state show odd"),
        ("called", "/v1/responses"),
        ("conv_x", "another name"),
    ):
        done = nanovllm(*CHAT, "--session", name, "--state-dir", str(tmp_path), stdin="x\n")
        assert done.returncode == 2 and mend in done.stderr, done.stderr


@pytest.mark.parametrize("said", [b"<html>", b"[]", b"{}", b"[" * 100_000])
def test_a_server_that_keeps_no_conversations_is_told_in_a_sentence(nanovllm: Run, said: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        done = nanovllm("chat", "--url", url, "--model", "x", "--session", "ada", stdin="x\n")
        other.shutdown()
    assert done.returncode == 1 and "may keep no conversations" in done.stderr, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("where", ["here", "server"])
def test_a_stopped_answer_is_kept_as_far_as_it_was_seen(
    start: Callable[..., subprocess.Popen[bytes]], nanovllm: Run, tmp_path: Path, server: LiveServer, where: str
) -> None:
    place = ("tiny:random", "--state-dir", str(tmp_path)) if where == "here" else ("--url", server.server.url)
    flags = ("chat", *place, "--session", f"stopped {where}")
    ours, theirs = os.openpty()
    process = start(*flags, "--ignore-eos", "--max-tokens", "1900", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read_until(ours, b"> ")
    os.write(ours, b"hello\n")
    read_until(ours, b"hello\r\n")
    read_until(ours, b"", more=32)
    process.send_signal(signal.SIGINT)
    read_until(ours, b"> ")
    os.write(ours, b"/exit\n")
    assert process.wait(60) == 0
    os.close(ours)
    assert "goes on: 2 messages" in nanovllm(*flags, "--max-tokens", "6", stdin="").stderr
