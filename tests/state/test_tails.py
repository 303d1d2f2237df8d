"""Where room is wanted, sessions lose their ends before any session goes as a whole."""

from __future__ import annotations

from dataclasses import replace

from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from tests.state.stores import BLOCK_BYTES, SETTINGS, World, blocks_for, check_books, spill

SHARED = [9, 9, 9, 9]
TURNS = [{"role": "user", "content": "hi"}]


def talk(store: StateStore, first: int, length: int = 16) -> str:
    """A session of a shared block and three of its own, its KV in memory."""
    tokens = [*SHARED, *range(first, first + length - 4)]
    spill(store, blocks_for(store, tokens), "host")
    store.touch([block.digest for block in blocks_for(store, tokens)], 0, length, hit=False)
    return store.put(Session(TURNS, tokens))


def blocks(store: StateStore, state_id: str) -> list[bool]:
    """Which of its blocks are in memory."""
    entries = store.plane.catalog.entries
    return [key in entries and "host" in entries[key].tiers for key in store.find(state_id).chain]


def opened(tail: int, host_bytes: int = 1 << 20) -> StateStore:
    return World(None, host_bytes=host_bytes).open(settings=replace(SETTINGS, session_tail=tail))


def test_every_session_is_trimmed_before_one_goes() -> None:
    store = opened(tail=8)
    ids = [talk(store, first) for first in (20, 40, 60)]
    for freed in range(1, 7):
        assert store.evict(kind="session", bytes=1).ok
        lost = [4 - sum(blocks(store, state_id)) for state_id in ids]
        assert lost == [min(2, max(0, freed - 2 * i)) for i in range(3)]  # the oldest first, two blocks each
        check_books(store)
    assert store.evict(kind="session", bytes=1).ok  # now the oldest goes on
    assert [sum(blocks(store, state_id)) for state_id in ids] == [1, 2, 2]
    receipts = [r for r in store.explain(ids[0]).receipts if r.action == "evict"]
    assert [r.candidates[0].reason for r in receipts][:2] == ["tail of a session"] * 2
    assert receipts[-1].candidates[0].reason == "lowest score"


def test_what_sessions_share_and_what_is_pinned_stays() -> None:
    store = opened(tail=16)
    ids = [talk(store, first) for first in (20, 40)]
    assert store.pin(ids[1], "host").ok
    while store.evict(kind="session", bytes=1).ok:
        pass
    assert blocks(store, ids[1]) == [True] * 4 and blocks(store, ids[0]) == [True, False, False, False]


def test_without_a_tail_the_oldest_session_goes_first() -> None:
    store = opened(tail=0)
    ids = [talk(store, first) for first in (20, 40)]
    for _ in range(3):
        assert store.evict(kind="session", bytes=1).ok
    assert [sum(blocks(store, state_id)) for state_id in ids] == [1, 4]


def test_room_made_by_itself_leaves_a_receipt_with_candidates() -> None:
    store = opened(tail=8, host_bytes=14 * (BLOCK_BYTES + 400))
    ids = [talk(store, first) for first in (20, 40, 60, 80, 100, 120)]
    made = [receipt for receipt in store.plane.history.recent if receipt.action == "reclaim"]
    assert made and all(receipt.ok and receipt.candidates and receipt.size_bytes for receipt in made)
    assert "from the tails of sessions" in made[0].reason and made[0].detail["trimmed"] > 0
    assert any(receipt.action == "reclaim" for state_id in ids for receipt in store.explain(state_id).receipts)
    check_books(store)
