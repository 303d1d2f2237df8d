"""A store with several things under way at once: group commits, conflicts, late writes, drops."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm.core.clock import MonotonicClock
from nanovllm.errors import (
    StateConflictError,
    StateNotFoundError,
    StateRefusedError,
)
from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.folder import Folder
from tests.state.stores import SETTINGS, World, blocks_for, check_books, spill

TOKENS = list(range(16))  # four blocks


def test_puts_that_come_together_share_a_commit(tmp_path: Path) -> None:
    gate, syncs = threading.Event(), []

    class Slow(Folder):
        def sync_names(self) -> None:
            if self.role == "texts":
                gate.wait(10)
                syncs.append(len(self.names()))
            super().sync_names()

    store = World(tmp_path / "state", folder_class=Slow).open(threads=True, clock=MonotonicClock())
    told: list[str] = []
    waiting = [store.put_later(f"text {i}", {"name": f"n{i}"}, lambda p: told.append(p.result())) for i in range(20)]
    assert not any(pending.done for pending in waiting) and not store.ls()
    gate.set()
    store.settle()
    assert len(syncs) == 2, "the first one alone, the other nineteen together"
    assert told == [pending.result() for pending in waiting] and len(store.ls()) == 20
    assert all(store.get(state_id) == f"text {i}" for i, state_id in enumerate(told))
    store.close()


def test_of_two_changes_at_once_one_is_refused(tmp_path: Path) -> None:
    gate = threading.Event()

    class Slow(Folder):
        def sync(self, fd: int) -> None:
            gate.wait(10)
            super().sync(fd)

    store = World(tmp_path / "state", folder_class=Slow).open(threads=True, clock=MonotonicClock())
    first = store.put_later([{"role": "user", "content": "1"}], {"name": "talk"})
    with pytest.raises(StateConflictError, match="already"):
        store.put_later([{"role": "user", "content": "2"}], {"name": "talk"})
    gate.set()
    store.settle()
    state_id = first.result()
    gate.clear()
    turn = store.update_later(state_id, Session([{"role": "user", "content": "2"}]), generation=1)
    with pytest.raises(StateConflictError, match="under way"):
        store.update_later(state_id, Session([{"role": "user", "content": "3"}]), generation=1)
    dropped = threading.Timer(0.05, gate.set)
    dropped.start()
    assert store.drop(state_id).ok  # waits behind the write, on its lane
    store.settle()
    with pytest.raises(StateNotFoundError, match="meanwhile"):
        turn.result()
    assert not store.ls() and not list((tmp_path / "state" / "texts").iterdir())
    store.close()
    dropped.join()


def test_evicting_much_at_once_does_not_crowd_out_a_put(tmp_path: Path) -> None:
    store = World(tmp_path / "state").open(threads=True, clock=MonotonicClock())
    for i in range(300):
        spill(store, blocks_for(store, [i] * 4), "disk")
    assert store.evict(tier="disk", bytes=250 * 500).ok
    assert store.put("room for this", {"durable": True}).receipt.reason == "durable"
    store.settle()
    assert store.plane.places["disk"].writes.state == "closed" and store.top()["tiers"]["disk"]["refused"] == 0
    check_books(store)
    store.close()


def test_a_late_write_that_was_refused_takes_nothing_from_the_one_that_was_acknowledged(tmp_path: Path) -> None:
    """The second attempt at a generation is on the disk, and stays there when the first one arrives after all."""
    settings, may_write = replace(SETTINGS, write_deadline_ms=200.0), threading.Event()
    store = StateStore([DiskTier(tmp_path, 2 << 20)], settings=settings, model="m")
    state_id = store.put(Session([{"role": "user", "content": "one"}], [1]), {"name": "talk"})
    tier = store.plane.places["disk"].tier
    write, calls = tier.write, iter(range(9))

    def slow(items: Any) -> Any:
        if next(calls) == 0:
            assert may_write.wait(30)
        return write(items)

    tier.write = slow  # type: ignore[method-assign]
    with pytest.raises(StateRefusedError):
        store.update(state_id, Session([{"role": "user", "content": "two"}], [1, 2]), generation=1)
    may_write.set()
    for _ in range(200):
        try:
            store.update(state_id, Session([{"role": "user", "content": "two again"}], [1, 2]), generation=1)
            break
        except StateRefusedError:
            time.sleep(0.05)
    for _ in range(20):
        store.tick()
        store.settle()
    store.close()
    with StateStore([DiskTier(tmp_path, 2 << 20)], settings=settings, model="m") as again:
        kept = again.get(state_id)
        assert isinstance(kept, Session) and kept.messages[0]["content"] == "two again" and not again.warnings


def test_a_drop_that_nobody_waits_for_in_a_thread_is_told_when_the_bytes_are_gone(tmp_path: Path) -> None:
    store = StateStore([DiskTier(tmp_path, 2 << 20)], settings=SETTINGS, model="m")
    state_id, told = store.put("a secret", {"name": "s"}), []
    may_drop = threading.Event()
    tier = store.plane.places["disk"].tier
    drop = tier.drop
    tier.drop = lambda keys, **more: (may_drop.wait(30), drop(keys, **more))[1]  # type: ignore[method-assign,assignment]
    store.later("drop", lambda result, error: told.append((result, error)), state_id=state_id)
    store.poll()
    assert not told and store.ls() == []  # cannot be found, and is not said to be gone
    may_drop.set()
    store.settle()
    store.poll()
    assert told[0][0].ok and not any(b"a secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    store.close()
