"""Turns: whatever several owners submit, in whatever order it ends, each gets its share and its own order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.turns import Turns

AT_ONCE, EACH = 3, 2


class Threads:
    """In place of a pool: what was handed over runs when the test says so."""

    def __init__(self, *_: object) -> None:
        self.begun: list[tuple[Callable[..., None], str, Callable[[], None]]] = []
        self.is_down = False

    def submit(self, call: Callable[..., None], owner: str, work: Callable[[], None]) -> None:
        self.begun.append((call, owner, work))

    def shutdown(self, wait: bool) -> None:
        self.is_down = True


@given(st.lists(st.one_of(st.sampled_from("abc"), st.integers(0, 9)), max_size=60))
def test_shares_and_order(deeds: list[str | int]) -> None:
    """A letter submits for that owner, a number lets one of those that run end."""
    with patch("nanovllm.engine.turns.ThreadPoolExecutor", Threads):
        turns = Turns(AT_ONCE, EACH, "test")
    threads: Threads = turns._threads  # type: ignore[assignment]
    submitted: Counter[str] = Counter()
    done: list[tuple[str, int]] = []

    def end(index: int) -> None:
        call, owner, work = threads.begun.pop(index % len(threads.begun))
        call(owner, work)

    def check() -> None:
        running = Counter(owner for _, owner, _ in threads.begun)
        assert running.total() <= AT_ONCE and all(count <= EACH for count in running.values())
        waiting = {owner for owner in "abc" if turns.num_waiting(owner)}
        assert running.total() == AT_ONCE or all(running[owner] == EACH for owner in waiting), "a thread is idle"

    for deed in deeds:
        if isinstance(deed, str):
            turns.submit(deed, partial(done.append, (deed, submitted[deed])))
            submitted[deed] += 1
        elif threads.begun:
            end(deed)
        check()
    turns.close()
    with pytest.raises(RuntimeError):
        turns.submit("a", list)
    while threads.begun:
        end(0)
        check()
    assert sorted(done) == [(owner, i) for owner in "abc" for i in range(submitted[owner])] and threads.is_down


def test_a_newcomer_is_next() -> None:
    with patch("nanovllm.engine.turns.ThreadPoolExecutor", Threads):
        turns = Turns(2, 2, "test")
    threads: Threads = turns._threads  # type: ignore[assignment]
    for _ in range(10):
        turns.submit("flood", list)
    turns.submit("victim", list)
    for _ in range(2):  # at most two that wait before: one that was in the queue, then the newcomer
        call, owner, work = threads.begun.pop(0)
        call(owner, work)
    assert "victim" in [owner for _, owner, _ in threads.begun]
