"""RequestStream: one request's deltas, for one consumer on the event loop.

What it is: a mailbox that merges while its consumer is slow, with the request's two
deadlines. What it knows nothing about: the engine, HTTP. Invariants: it ends once: in
`finished`, in an error, or by `close`; whoever ends it early aborts the request; it
holds at most one request's output, however slow the consumer is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from nanovllm.engine.messages import Delta, Finished
from nanovllm.errors import BusyError, DeadlineError, NanoVLLMError

OnEnd = Callable[[str, bool], None]  # request_id, and whether the engine is to abort it


class RequestStream:
    """Iterate over it for lists of deltas; `finished` is set when the iteration ends."""

    def __init__(self, request_id: str, on_end: OnEnd, on_start: Callable[[], None] | None = None) -> None:
        self.request_id = request_id
        self.finished: Finished | None = None
        self._on_end, self._on_start = on_end, on_start
        self._error: NanoVLLMError | None = None
        self._has_ended = self._is_started = False
        self._deltas: list[Delta] = []
        self._news = asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []

    def set_deadlines(self, queue_timeout_s: float | None, timeout_s: float | None) -> None:
        """Fail the stream if it has not started, or not ended, after so long."""
        loop = asyncio.get_running_loop()
        if timeout_s is not None:
            late = DeadlineError(f"The request took longer than {timeout_s:g} s.", hint="Ask for fewer tokens.")
            self._timers.append(loop.call_later(timeout_s, self.fail, late))
        if queue_timeout_s is not None:
            self._timers.append(loop.call_later(queue_timeout_s, self._fail_unless_started, queue_timeout_s))

    # -- from the engine ---------------------------------------------------------------------------

    def started(self) -> None:
        """The request's first step has run."""
        on_start, self._on_start = self._on_start, None
        self._is_started = True
        if on_start is not None:
            on_start()

    def push(self, delta: Delta) -> None:
        """More output."""
        self._deltas.append(delta)
        self._news.set()

    def finish(self, finished: Finished) -> None:
        """The engine has ended the request."""
        if finished.error is not None:
            self._error = finished.error.as_error()
        self.finished = finished
        self._end(abort=False)

    def fail(self, error: NanoVLLMError) -> None:
        """End it with an error, whatever the engine does meanwhile."""
        if not self._has_ended:
            self._error = error
            self._end(abort=True)

    # -- to the consumer ---------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Everything new since the last turn. Raises the request's error after its last deltas."""
        while True:
            await self._news.wait()
            self._news.clear()
            is_last = self._has_ended  # nothing is pushed after the end
            deltas, self._deltas = self._deltas, []
            if deltas:
                yield deltas
            if is_last:
                break
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """The consumer is gone. Aborts the request unless it has ended; safe to repeat."""
        self._end(abort=True)

    # -- the end -----------------------------------------------------------------------------------

    def _end(self, abort: bool) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        for timer in self._timers:
            timer.cancel()
        self._news.set()
        self._on_end(self.request_id, abort)

    def _fail_unless_started(self, waited_s: float) -> None:
        if not self._is_started:
            self.fail(BusyError(f"The request waited {waited_s:g} s for its turn.", hint="Try again later."))
