"""The load generator: requests sent on time, bytes kept with the time they came.

What it is: an asyncio client that does as little as possible while it measures;
nothing is parsed before the run is over (`load_report.py` does that). What it knows
nothing about: metrics, events, prompts' meaning. Invariants: every request ends in
exactly one `Exchange`, whatever the server does; every wait has a limit; open-loop
requests are sent at their time whether or not earlier ones were answered.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ConfigError
from nanovllm.lab.address import Address

if TYPE_CHECKING:
    import aiohttp

MAX_ANSWER_BYTES = 2**26


@dataclass
class Exchange:
    """What went over the wire for one request. Times are of time.monotonic_ns."""

    index: int
    due_ns: int | None  # open loop: when it should have been sent
    sent_ns: int = 0
    ended_ns: int = 0
    status: int | None = None  # None: no response came
    content_type: str = ""
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    failure: str | None = None  # timeout, refused, cut, too_long; None where the wire did its part


@dataclass(frozen=True)
class Run:
    """All exchanges of one run, in the order they were planned, and what the client itself cost."""

    exchanges: list[Exchange]
    wall_ns: int
    cpu_ns: int
    server: str = ""  # the Server header, where there was one


@dataclass(frozen=True)
class Plan:
    """What to send. Exactly one of `arrivals_ns` (open loop) and `concurrency` (closed loop) is given."""

    path: str
    bodies: list[dict[str, Any]]
    timeout_s: float
    arrivals_ns: list[int] | None = None
    concurrency: int | None = None


def require_aiohttp() -> None:
    """Raises ConfigError with the command that installs what this needs."""
    try:
        import aiohttp  # noqa: F401  its import is the question
    except ImportError:
        hint = 'Install it: python -m pip install "aiohttp>=3.11".'
        raise ConfigError("The load generator needs the package aiohttp.", hint=hint) from None


def send(address: Address, plan: Plan, on_end: Callable[[], None] = lambda: None) -> Run:
    """Carry out the plan; `on_end` is called as each request ends."""
    require_aiohttp()
    return asyncio.run(_Client(address, plan, on_end).run())


class _Client:
    """One run. The bodies are bytes before it begins, so that sending costs no encoding."""

    def __init__(self, address: Address, plan: Plan, on_end: Callable[[], None]) -> None:
        self._url, self._headers = address.url + plan.path, address.headers
        self._plan, self._on_end = plan, on_end
        self._bodies = [json.dumps(body).encode() for body in plan.bodies]
        self._exchanges = [Exchange(index, None) for index in range(len(self._bodies))]
        self._server = ""

    async def run(self) -> Run:
        import aiohttp

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._plan.timeout_s),
            headers=self._headers,
            auto_decompress=False,
        )
        async with session:
            start_ns, cpu_ns = time.monotonic_ns(), time.process_time_ns()
            await (self._closed_loop(session) if self._plan.arrivals_ns is None else self._open_loop(session, start_ns))
            wall_ns, cpu_ns = time.monotonic_ns() - start_ns, time.process_time_ns() - cpu_ns
        return Run(self._exchanges, wall_ns, cpu_ns, self._server)

    async def _open_loop(self, session: aiohttp.ClientSession, start_ns: int) -> None:
        async with asyncio.TaskGroup() as group:
            for exchange, at_ns in zip(self._exchanges, self._plan.arrivals_ns or []):
                exchange.due_ns = start_ns + at_ns
                wait_ns = exchange.due_ns - time.monotonic_ns()
                if wait_ns > 0:
                    await asyncio.sleep(wait_ns / 1e9)
                group.create_task(self._exchange(session, exchange))

    async def _closed_loop(self, session: aiohttp.ClientSession) -> None:
        remaining = iter(self._exchanges)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._plan.concurrency or 1, len(self._exchanges))):
                group.create_task(self._worker(session, remaining))

    async def _worker(self, session: aiohttp.ClientSession, remaining: Iterator[Exchange]) -> None:
        for exchange in remaining:
            await self._exchange(session, exchange)

    async def _exchange(self, session: aiohttp.ClientSession, exchange: Exchange) -> None:
        """Send one request and keep what comes. A failure is a value here: the other requests go on."""
        import aiohttp

        exchange.sent_ns = time.monotonic_ns()
        try:
            await self._talk(session, exchange)
        except TimeoutError:
            exchange.failure = "timeout"
        except aiohttp.ClientConnectorError:
            exchange.failure = "refused"
        except (aiohttp.ClientError, OSError, ValueError):  # ValueError: headers or lines that are no HTTP
            exchange.failure = "cut"
        exchange.ended_ns = time.monotonic_ns()
        self._on_end()

    async def _talk(self, session: aiohttp.ClientSession, exchange: Exchange) -> None:
        body = self._bodies[exchange.index]
        async with session.post(self._url, data=body, allow_redirects=False) as response:
            exchange.status, exchange.content_type = response.status, response.content_type
            self._server = response.headers.get("Server", self._server)
            total = 0
            async for chunk in response.content.iter_any():
                exchange.chunks.append((time.monotonic_ns(), chunk))
                total += len(chunk)
                if total > MAX_ANSWER_BYTES:
                    exchange.failure = "too_long"
                    return
