"""Commands: calls from other threads, applied by the one thread that owns the state.

What it is: a bounded queue of calls, each answered through a future. What it knows nothing about: HTTP, the
engine. Invariants: a call runs once, between steps, on the owner's thread; its result or its error reaches
whoever asked; a full queue refuses at once.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nanovllm.errors import BusyError
from nanovllm.state.store import StateStore

T = TypeVar("T")
Call = Callable[[StateStore], Any]
MAX_WAITING = 256


class Commands:
    """From many threads to one."""

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Call, Future[Any]]] = queue.Queue(MAX_WAITING)

    def submit(self, call: Callable[[StateStore], T]) -> Future[T]:
        """`commands.submit(lambda store: store.pin(state_id))`. Raises BusyError where too many wait."""
        future: Future[T] = Future()
        try:
            self._calls.put_nowait((call, future))
        except queue.Full:
            raise BusyError(f"{MAX_WAITING} state commands wait already.", hint="Try again soon.") from None
        return future

    def apply(self, store: StateStore, most: int = MAX_WAITING) -> int:
        """Run what waits, on the owner's thread; how many ran."""
        for done in range(most):
            try:
                call, future = self._calls.get_nowait()
            except queue.Empty:
                return done
            if future.set_running_or_notify_cancel():
                _answer(store, call, future)
        return most

    def close(self, error: Exception) -> None:
        """Nobody will run what still waits."""
        while not self._calls.empty():
            _, future = self._calls.get_nowait()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _answer(store: StateStore, call: Call, future: Future[Any]) -> None:
    try:
        future.set_result(call(store))
    except Exception as error:  # noqa: BLE001  (it belongs to whoever asked)
        future.set_exception(error)
