"""One server's life: bind, load, serve, drain, end.

What it is: `HttpServer`, which drives uvicorn, and `serve_until_signalled`, which the
verb runs. What it knows nothing about: requests, how settings are shown. Invariants: the
port is bound before the model loads, and stays open while the server drains; what runs
gets its time to end, then an error; signal handlers are installed by
`serve_until_signalled` alone; a second signal ends the process at once, with its child.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from nanovllm.serve.app import build_app
from nanovllm.serve.connection import Connection
from nanovllm.serve.context import Services
from nanovllm.serve.defaults import generation_defaults
from nanovllm.serve.listener import BACKLOG, url_of
from nanovllm.serve.metrics import measure_loop_lag
from nanovllm.serve.reception import longest_token
from nanovllm.state.tiers.ownership import note_address

ANSWER_S = 5.0  # for last answers to be written, once the engine has ended their requests
POLL_S = 0.02
COLLECT_AT = (20_000, 20, 100)  # a collection stops every thread; a burst allocates, and gives back, much
SECURITY_HEADERS = [("x-content-type-options", "nosniff"), ("cross-origin-resource-policy", "same-origin")]


class HttpServer:
    """Serves on `listener`. `await run()`; `stop()` from any thread or a signal handler."""

    def __init__(self, services: Services, listener: socket.socket) -> None:
        self.services, self._listener = services, listener
        self.url = url_of(listener)
        self.is_stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()

    async def run(self, on_ready: Callable[[], None], on_open: Callable[[], None] = lambda: None) -> None:
        """Serve until stopped; returns when all has ended. Raises what loading the model raises.

        `on_open` is called when the port answers, `on_ready` when requests are taken.
        """
        self._loop = asyncio.get_running_loop()
        http = _uvicorn(self.services, self._listener)
        await http.startup(sockets=[self._listener])
        ticking = asyncio.create_task(http.main_loop())
        measuring = asyncio.create_task(self._measure())
        try:
            on_open()
            if await self._load():
                on_ready()
                await self._stopping.wait()
                await self._drain()
        finally:
            measuring.cancel()
            if self.services.feed is not None:
                self.services.feed.close()
            http.should_exit = True
            await ticking
            await http.shutdown(sockets=[self._listener])
            await self._end_engine()

    def stop(self) -> None:
        """Take no more requests, let those that run end, then return from `run`."""
        self.is_stopped = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def _load(self) -> bool:
        """Load the model; False where a stop came first."""
        if self.is_stopped:  # before the loop could be told
            return False
        loading = asyncio.create_task(self.services.engine.start())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if loading.done():
            await loading
            await self._read_defaults()
            self.services.is_loaded = True
            if self.services.engine.config.state_dir is not None:  # its engine owns the folder by now
                note_address(Path(self.services.engine.config.state_dir), self.url)
            return True
        self.services.engine.kill()
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        return False

    async def _measure(self) -> None:
        if self.services.metrics is not None:
            await measure_loop_lag(self.services.metrics.loop_lag)

    async def _read_defaults(self) -> None:
        """What the model's files say about sampling, and how long its tokens are; looked up in a thread."""
        services, loop = self.services, asyncio.get_running_loop()
        read = partial(generation_defaults, services.engine.config.model, services.config.generation_config)
        services.generation_defaults = await loop.run_in_executor(services.pool, read)
        measure = partial(longest_token, services.engine.tokenizer)
        services.longest_token = await loop.run_in_executor(services.pool, measure)

    async def _drain(self) -> None:
        """The gate refuses from here on; the engine ends what it has, and the answers are written."""
        self.services.engine.drain()
        await self.services.engine.drained(self.services.config.shutdown_timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                while self.services.admission.in_flight:
                    await asyncio.sleep(POLL_S)

    async def _end_engine(self) -> None:
        if self.services.engine.state != "loading":
            await self.services.engine.close()
        self.services.pool.shutdown(wait=False, cancel_futures=True)
        if self.services.traces is not None:
            await asyncio.to_thread(self.services.traces.close)


def serve_until_signalled(
    server: HttpServer, on_open: Callable[[], None], on_ready: Callable[[], None], on_stop: Callable[[], None]
) -> None:
    """Run `server` in this, the main, thread until SIGTERM or SIGINT; at the second one, leave at once."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if server.is_stopped:
            server.services.engine.kill()
            os._exit(128 + number)
        server.stop()
        on_stop()

    def on_loaded() -> None:
        """What was loaded stays: walking it at each full collection would stop the loop for 200 ms at a time."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT_AT)
        on_ready()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(server.run(on_loaded, on_open))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _uvicorn(services: Services, listener: socket.socket) -> uvicorn.Server:
    """uvicorn, set up and told to log nothing that we do not; its own signal handling is in `serve`, not used."""
    settings = services.config
    config = uvicorn.Config(
        build_app(services),
        http=partial(Connection, settings=settings),  # type: ignore[arg-type]  # a class, but for one argument
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,  # who asks is not decided by what they say
        backlog=BACKLOG,
        timeout_keep_alive=int(settings.keep_alive_timeout) or 1,
        timeout_graceful_shutdown=int(ANSWER_S),
        h11_max_incomplete_event_size=services.limits.header_bytes,
        server_header=False,
        headers=SECURITY_HEADERS,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    return server
