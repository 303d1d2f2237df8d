"""A live server in a thread, and what tests of its surface ask it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nanovllm.config import EngineConfig
from nanovllm.serve.app import build_services
from nanovllm.serve.config import Limits, ServerConfig
from nanovllm.serve.context import Services
from nanovllm.serve.listener import bind
from nanovllm.serve.run import HttpServer

START_S, STOP_S, ASK_S = 120, 30, 60
HI = [{"role": "user", "content": "hi"}]


@dataclass
class Live:
    """A running server: `ask` it over HTTP, look at it through `services`."""

    url: str
    services: Services
    http: httpx.Client

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

    def is_alive(self) -> bool:
        """Normal requests succeed, nothing runs, no block is held."""
        for _ in range(3):
            assert self.chat(max_tokens=2).status_code == 200
        assert self.http.get("/health/ready").status_code == 200
        return self.services.engine.num_live == 0 and self.services.admission.in_flight == 0


@contextmanager
def live_server(model: str, *, server: dict[str, Any] | None = None, **engine: Any) -> Iterator[Live]:
    services = build_services(EngineConfig(model=model, **engine), ServerConfig(port=0, **(server or {})), Limits())
    http = HttpServer(services, bind(services.config))
    ready, failures = threading.Event(), []

    def run() -> None:
        try:
            asyncio.run(http.run(ready.set))
        except Exception as error:  # noqa: BLE001  shown by the test
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(START_S) and not failures, failures
    try:
        with httpx.Client(base_url=http.url, timeout=ASK_S) as client:
            yield Live(http.url, services, client)
    finally:
        http.stop()
        thread.join(STOP_S)
        assert not thread.is_alive() and not failures, failures


@pytest.fixture(scope="session")
def tiny() -> Iterator[Live]:
    """tiny:random in float32, its namespace bare: ~1 ms a token."""
    with live_server("tiny:random", dtype="float32", num_blocks=1024, check_invariants=True) as live:
        yield live


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[Live]:
    """The default model."""
    server = {"served_model_name": ("smollm2", "smol")}
    with live_server(str(smollm2_path), server=server, dtype="float32", num_blocks=512, max_model_len=2048) as live:
        yield live
