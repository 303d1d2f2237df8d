"""Servers for tests: `server(**settings)` shares one per settings, `fresh_server` and `process` are the test's own."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.serve.servers import LiveServer, ServerProcess, running
from tests.serve.surface import smollm2, tiny

__all__ = ["smollm2", "tiny"]  # fixtures of the surface's tests
MOST_SHARED = 4  # running at once; the one used longest ago ends first
Factory = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[Factory]:
    """Servers that outlive the tests which use them."""
    kept: dict[str, LiveServer] = {}

    def get(**settings: Any) -> LiveServer:
        key = repr(sorted(settings.items()))
        live = kept.pop(key, None)
        if live is None or not live.is_running:
            live = LiveServer(**settings).start()
        kept[key] = live
        while len(kept) > MOST_SHARED:
            kept.pop(next(iter(kept))).stop()
        return live

    yield get
    for live in kept.values():
        live.stop()


@pytest.fixture
def server(shared_servers: Factory) -> Factory:
    """A running server with these settings of engine, server and limits (`limit_...`); leave it as you found it."""
    return shared_servers


@pytest.fixture
def fresh_server() -> Iterator[Factory]:
    """A server of the test's own, to be drained, broken or filled."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(**settings))


@pytest.fixture
def log() -> Iterator[Callable[[], str]]:
    """All that the server logs from here on; heard at its own logger, whatever the command line did to the parents."""
    logger, text = logging.getLogger("nanovllm.serve"), io.StringIO()
    handler, before = logging.StreamHandler(text), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield text.getvalue
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def process() -> Iterator[Callable[..., ServerProcess]]:
    """`nanovllm serve tiny:random --port 0` with more flags, as a process that takes signals; ready."""
    started: list[ServerProcess] = []

    def start(*arguments: str, **env: str) -> ServerProcess:
        one = ServerProcess(*arguments, **env)
        started.append(one)
        return one.wait_ready()

    yield start
    for one in started:
        one.end()
