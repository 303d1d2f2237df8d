"""Turns: threads for work of several owners, none of whom can keep the others waiting.

What it is: a pool that takes what waits owner by owner, and no more than so much of one
owner's at once. What it knows nothing about: what the work is. Invariants: one owner's work
begins in the order it came; an owner with nothing running is next when a thread is free.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Work = Callable[[], None]


class Turns:
    """At most `at_once` threads, at most `each` of them for one owner."""

    def __init__(self, at_once: int, each: int, name: str) -> None:
        self._at_once, self._each = at_once, each
        self._threads = ThreadPoolExecutor(at_once, name)  # starts its threads when it is first used
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Work]] = {}  # in the order of their turns
        self._running: Counter[str] = Counter()
        self._is_closed = False

    def submit(self, owner: str, work: Work) -> None:
        """Have `work`, which must not raise, done in a thread when it is its turn. Raises RuntimeError once closed."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("no more work is taken")
            self._waiting.setdefault(owner, deque()).append(work)
            self._begin()

    def num_waiting(self, owner: str) -> int:
        """Work of `owner` that has not begun."""
        with self._lock:
            return len(self._waiting.get(owner, ()))

    def close(self) -> None:
        """Take no more; what was submitted is still done."""
        with self._lock:
            self._is_closed = True
            self._end()

    def _begin(self) -> None:
        """Start what may start. The lock is held."""
        while (owner := self._next_owner()) is not None:
            queue = self._waiting.pop(owner)
            work = queue.popleft()
            if queue:  # behind the others
                self._waiting[owner] = queue
            self._running[owner] += 1
            self._threads.submit(self._do, owner, work)

    def _next_owner(self) -> str | None:
        if self._running.total() >= self._at_once:
            return None
        return next((owner for owner in self._waiting if self._running[owner] < self._each), None)

    def _do(self, owner: str, work: Work) -> None:
        try:
            work()
        finally:
            with self._lock:
                self._running[owner] -= 1
                self._running += Counter()  # forgets those with none
                self._begin()
                self._end()

    def _end(self) -> None:
        if self._is_closed and not self._running:
            self._threads.shutdown(wait=False)
