"""What the session benchmark is built from: a server that can be killed, one turn over HTTP, and its meters.

A turn is streamed, so that TTFT is the client's: from sending the request to the first piece of text. T_queue is the
server's own, from two readings of /metrics around the turn; one conversation at a time makes the difference its own.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served import ROOT, get, port_of

ASK_S = 300


@dataclass
class Turn:
    """One answered turn. Times are milliseconds, measured."""

    text: str = ""
    response_id: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    t_queue_ms: float = 0.0


class KillableServer:
    """`nanovllm serve` in a process of its own, until it is killed with -9."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "nanovllm", "serve", *flags, "--port", "0"]
        start = time.perf_counter()
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.port = port_of(self._process)
        self.start_s = time.perf_counter() - start

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, closed or said."""
        self._process.kill()
        self._process.wait()

    def meter(self, name: str) -> float:
        """The sum of a metric's samples over its labels, such as `request_queue_time_seconds_sum`."""
        lines = [line for line in get(self.port, "/metrics").splitlines() if line.startswith(f"nanovllm:{name}")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def block_bytes(self) -> float:
        """KV bytes of one block: the pool's bytes over its blocks."""
        return self.meter("kv_bytes{") / self.meter("kv_blocks{")


@dataclass
class Conversation:
    """A conversation by `previous_response_id` (`responses`), or by sending its history again (`chat`)."""

    api: str
    options: dict[str, Any]
    previous: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, server: KillableServer, text: str) -> Turn:
        """One turn, which the conversation then remembers."""
        self.messages.append({"role": "user", "content": text})
        before = server.meter("request_queue_time_seconds_sum")
        turn = self._by_id(server, text) if self.api == "responses" else _chat(server, self.messages, self.options)
        self.messages.append({"role": "assistant", "content": turn.text})
        self.previous = turn.response_id
        turn.t_queue_ms = 1000 * (_settled(server, before) - before)
        return turn

    def ask_cold(self, server: KillableServer, salt: str) -> Turn:
        """The last turn's prompt again, in a namespace where nothing can be found: a full prefill, one token."""
        return _chat(server, self.messages[:-1], {**self.options, "max_tokens": 1, "cache_salt": salt})

    def _by_id(self, server: KillableServer, text: str) -> Turn:
        body = {**self.options, "input": text, "stream": True}
        body["max_output_tokens"] = body.pop("max_tokens")
        body |= {"previous_response_id": self.previous} if self.previous else {}
        return _told(server, "/v1/responses", body)


def _settled(server: KillableServer, before: float) -> float:
    """The meter once it has moved: a request is counted when it ends, which may be after its last byte."""
    for _ in range(100):
        now = server.meter("request_queue_time_seconds_sum")
        if now != before:
            return now
        time.sleep(0.01)
    return before


def _chat(server: KillableServer, messages: list[dict[str, str]], options: dict[str, Any]) -> Turn:
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    return _told(server, "/v1/chat/completions", {**options, **streaming, "messages": messages})


def _told(server: KillableServer, path: str, body: dict[str, Any]) -> Turn:
    """Send and read the events to their end. Raises SystemExit with what the server said instead."""
    turn, start = Turn(), time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ASK_S)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"{path}: {reply.status} {reply.read(500).decode(errors='replace')}")
    for event in _events(reply):
        _take(turn, event, start)
    turn.total_ms = 1000 * (time.perf_counter() - start)
    connection.close()
    if not turn.prompt_tokens:
        raise SystemExit(f"{path}: the stream ended without usage")
    return turn


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _take(turn: Turn, event: dict[str, Any], start: float) -> None:
    """What one event adds, of either interface."""
    if event.get("error"):
        raise SystemExit(f"the stream failed: {event['error']}")
    response = event.get("response") or {}
    piece = _text(event)
    if piece and not turn.text:
        turn.ttft_ms = 1000 * (time.perf_counter() - start)
    turn.text += piece
    turn.response_id = response.get("id", turn.response_id)
    usage = event.get("usage") or response.get("usage")
    if usage:
        turn.prompt_tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        turn.cached_tokens = details["cached_tokens"]
        turn.hits = (usage.get("nanovllm") or {}).get("hit_tokens_by_tier", {})


def _text(event: dict[str, Any]) -> str:
    """The text that an event brings; an empty one where it brings none."""
    if event.get("type") == "response.output_text.delta":
        return event["delta"]
    choices = event.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages (`posix_fadvise`); without root it may keep some."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
