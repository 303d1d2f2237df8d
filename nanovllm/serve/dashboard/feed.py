"""GET /dashboard/events: the engine's state as server-sent events, for a few viewers.

What it is: who looks, and what each of them has not been sent yet. What it knows nothing
about: what a picture consists of, how it is drawn. Invariants: the engine is asked for views
only while somebody looks, at most one a period; a viewer is owed at most MAX_PENDING
increments: one that is slower gets a new snapshot in place of them, one that takes nothing is given up; all streams
end when the server does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

import anyio
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from nanovllm.engine.messages import StateView, StepReport
from nanovllm.errors import BusyError, DrainingError
from nanovllm.serve import sse
from nanovllm.serve.answer import until_gone
from nanovllm.serve.context import Services
from nanovllm.serve.dashboard.board import Board

FEED_PATH = "/dashboard/events"
PERIOD_S = 0.25  # at most four increments a second
LOOK_S = 0.5  # between two looks at the engine's state, which a dead engine cannot tell
MAX_VIEWERS, MAX_PENDING = 8, 8


class Viewer:
    """One open page: what it is owed."""

    def __init__(self, snapshot: Callable[[], bytes]) -> None:
        self._snapshot = snapshot
        self._pending: deque[bytes] = deque()
        self._is_owed_all = True
        self._news = asyncio.Event()
        self._is_over = False

    def put(self, data: bytes) -> None:
        """Owe it an increment; or everything, where it has fallen behind."""
        if len(self._pending) >= MAX_PENDING:
            self.owe_all()
        elif not self._is_owed_all:
            self._pending.append(data)
        self._news.set()

    def owe_all(self) -> None:
        """A snapshot stands for whatever was pending, and for what comes until it is taken."""
        self._pending.clear()
        self._is_owed_all = True
        self._news.set()

    def end(self) -> None:
        """Nothing more will come."""
        self._is_over = True
        self._news.set()

    async def take(self, beat_s: float) -> bytes | None:
        """What is owed; a comment after a silence, None at the end."""
        if not (self._is_owed_all or self._pending or self._is_over):
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(beat_s):
                    await self._news.wait()
        if self._is_owed_all:
            self._is_owed_all = False
            return self._snapshot()
        if self._pending:
            data = b"".join(self._pending)
            self._pending.clear()
            return data
        return None if self._is_over else sse.PING


class Feed:
    """The viewers of one server. Everything here runs on its event loop."""

    def __init__(self, services: Services) -> None:
        self._services, self._board = services, Board()
        self._viewers: set[Viewer] = set()
        self._state = ""  # as the viewers know it
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False
        services.engine.listeners.append(self._hear)
        services.engine.viewers.append(self._see)

    @property
    def num_viewers(self) -> int:
        """Open pages."""
        return len(self._viewers)

    def open(self) -> Viewer:
        """One more. Raises BusyError, DrainingError."""
        if self._is_closed:
            raise DrainingError("The server is shutting down.")
        if len(self._viewers) >= MAX_VIEWERS:
            raise BusyError(f"{MAX_VIEWERS} dashboards are open already.", hint="Close one of them.")
        viewer = Viewer(self._snapshot)
        self._viewers.add(viewer)
        if self._looking is None:
            self._state = self._state_now()
            self._services.engine.watch(PERIOD_S)
            self._looking = asyncio.get_running_loop().create_task(self._look())
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """One less; with the last one, the engine is left alone."""
        self._viewers.discard(viewer)
        if not self._viewers and self._looking is not None:
            self._looking.cancel()
            self._looking = None
            self._services.engine.watch(0)
            self._board.forget()

    def close(self) -> None:
        """The server ends: every stream is over once it has sent what it owes."""
        self._is_closed = True
        self._tell_state()
        for viewer in self._viewers:
            viewer.end()

    def _hear(self, report: StepReport) -> None:
        for finished in report.finished:
            self._board.ended(finished)

    def _see(self, view: StateView) -> None:
        """The engine's view. The first one is a snapshot to everybody."""
        if not self._viewers:
            return  # it was on its way when the last one left
        self._tell_state()
        is_first = self._board.is_empty
        frame = sse.frame(self._board.take(view))
        for viewer in self._viewers:
            if is_first:
                viewer.owe_all()
            else:
                viewer.put(frame)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._tell_state()

    def _tell_state(self) -> None:
        state = self._state_now()
        if state == self._state:
            return
        self._state = state
        if state == "loading":  # another engine will come: what this one held is gone
            self._board.forget()
        for viewer in self._viewers:
            viewer.put(self._status())

    def _state_now(self) -> str:
        """The engine's state; "hanging" where it has said nothing for too long."""
        services = self._services
        is_silent = services.engine.heartbeat_age_s > services.config.heartbeat_age
        return "hanging" if services.state == "ready" and is_silent else services.state

    def _status(self) -> bytes:
        return sse.frame({"type": "status", "state": self._state})

    def _snapshot(self) -> bytes:
        """The state, and the picture if there is one."""
        if self._board.is_empty:
            return self._status()
        info, names = self._services.engine.info, self._services.config.served_model_name
        return self._status() + sse.frame(self._board.snapshot(info, next(iter(names), info.model)))


class FeedAnswer:
    """One viewer's stream."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve until the client leaves or takes nothing, or the server ends."""
        feed = self._services.feed
        assert feed is not None
        viewer = feed.open()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
            async with anyio.create_task_group() as group:
                group.start_soon(until_gone, receive, group.cancel_scope)
                if scope["method"] != "HEAD":
                    await self._pump(viewer, send)
                group.cancel_scope.cancel()
        finally:
            feed.leave(viewer)

    async def _pump(self, viewer: Viewer, send: Send) -> None:
        config = self._services.config
        while (data := await viewer.take(config.heartbeat_interval)) is not None:
            with anyio.move_on_after(config.write_timeout) as limit:
                await send(_body(data, is_last=False))
            if limit.cancelled_caught:
                return  # the connection is cut, for its answer has no end
        await send(_body(b"", is_last=True))


async def events(request: Request) -> FeedAnswer:
    """The stream of one page."""
    return FeedAnswer(request.app.state.services)


def _body(data: bytes, *, is_last: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": not is_last}
