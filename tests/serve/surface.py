"""An HTTP client of a live server, with what tests of its surface ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nanovllm.serve.context import Services
from tests.serve.servers import ASK_S, LiveServer, running

HI = [{"role": "user", "content": "hi"}]


@dataclass
class Live:
    """`ask` the server over HTTP, look at it through `services`."""

    server: LiveServer
    http: httpx.Client

    @property
    def url(self) -> str:
        return self.server.server.url

    @property
    def services(self) -> Services:
        return self.server.services

    def ask(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        if isinstance(body, bytes):
            return self.http.post(path, content=body, headers={"content-type": "application/json"}, **kwargs)
        return self.http.post(path, json=body, **kwargs)

    def chat(self, messages: Any = None, **fields: Any) -> httpx.Response:
        return self.ask("/v1/chat/completions", {"messages": HI if messages is None else messages, **fields})

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.ask("/v1/completions", {"prompt": prompt, **fields})

    def events(self, path: str, body: Any) -> list[Any]:
        """The data of each event of a stream; `[DONE]` as text."""
        answer = self.ask(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        data = [line.removeprefix("data: ") for line in lines]
        return [json.loads(one) if one != "[DONE]" else one for one in data]


@contextmanager
def live_server(**settings: Any) -> Iterator[Live]:
    """A server of its own with these settings, and a client of it."""
    with running(**settings) as server, httpx.Client(base_url=server.server.url, timeout=ASK_S) as client:
        yield Live(server, client)


@pytest.fixture(scope="session")
def tiny() -> Iterator[Live]:
    """tiny:random in float32, its namespace bare: ~1 ms a token."""
    with live_server(num_blocks=1024, check_invariants=True) as live:
        yield live


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[Live]:
    """The default model."""
    names = ("smollm2", "smol")
    with live_server(model=str(smollm2_path), served_model_name=names, num_blocks=512, max_model_len=2048) as live:
        yield live
