"""Tenants beside each other: what each may keep, what it sees in lists, whose KV goes with whose state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.errors import StateRefusedError
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.objects import Session
from nanovllm.state.shelves import place_in_list
from nanovllm.state.store import StateStore
from nanovllm.state.storing import Pending
from tests.state.stores import SETTINGS, World, blocks_for, check_books, spill

TALK = Session([{"role": "user", "content": "hello"}], tuple(range(16)))


# -- what each may keep ------------------------------------------------------------------------------


def filled(store: StateStore, namespace: str, **more: Any) -> int:
    """Put texts of 20,000 letters until the store refuses; how many it took."""
    for count in range(1_000):
        try:
            store.put("x" * 20_000, {"namespace": namespace, **more})
        except StateRefusedError as refused:
            assert refused.receipt is not None and not refused.receipt.ok and refused.hint
            return count
    raise AssertionError("one tenant may fill everything")


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_one_tenant_cannot_lock_out_the_next(tmp_path: Path, tier: str) -> None:
    store = World(tmp_path if tier == "disk" else None, host_bytes=1 << 21, disk_bytes=1 << 21).open()
    counts = [filled(store, f"tenant-{i}", durable=tier == "disk") for i in range(4)]
    assert counts[0] > 20 and all(2 * more >= less - 2 for less, more in pairwise(counts)), counts
    assert counts[3] > 0
    left = store.holdings("tenant-0", "knowledge")
    assert left["objects"] == counts[0] and left["bytes_left"] < 20_500 and left["objects_left"] > 0
    check_books(store)
    store.close()


def test_what_is_left_is_what_is_taken() -> None:
    """`holdings` promises neither more nor much less than a put is given."""
    store = World(None, host_bytes=1 << 16).open()
    left = store.holdings("a", "session")["bytes_left"]
    with pytest.raises(StateRefusedError, match="bytes left for texts"):
        store.put(Session([{"content": "x" * left}]), {"namespace": "a"})
    store.put(Session([{"content": "x" * (left - 1_000)}]), {"namespace": "a"})
    assert store.holdings("a", "session")["bytes_left"] < 1_000


def test_puts_that_are_under_way_count(tmp_path: Path) -> None:
    store = World(tmp_path).open(threads=True, settings=replace(SETTINGS, objects_per_namespace=3))
    pending = [store.put_later("x", {"durable": True}) for _ in range(3)]
    assert store.holdings("default", "knowledge")["objects_left"] == 0
    with pytest.raises(StateRefusedError, match="3 objects"):
        store.put_later("x").result()
    store.settle()
    assert all(each.result() for each in pending) and store.holdings("default", "knowledge")["objects"] == 3
    store.put([1, 2], {"kind": "kv"})  # each kind has its own
    store.close()


def test_a_listener_that_raises_takes_nobody_elses_put_with_it(tmp_path: Path) -> None:
    """They share a commit: the others are told all the same, and the next group begins."""
    store = World(tmp_path).open(threads=True)
    told: list[str] = []

    def listener(name: str) -> Callable[[Pending], None]:
        def then(pending: Pending) -> None:
            told.append(name)
            if name in "bd":
                raise RuntimeError(name)

        return then

    pending = [store.put_later(name, {"durable": True}, listener(name)) for name in "abcde"]
    for _ in range(4):
        with suppress(RuntimeError):
            store.settle()
    assert sorted(told) == list("abcde") and all(each.done for each in pending)
    assert store.get(store.put("f", {"durable": True})) == "f"
    check_books(store)
    store.close()


def test_an_update_at_the_limit_has_the_room_of_what_it_replaces() -> None:
    store = World(None).open(settings=replace(SETTINGS, text_bytes_per_namespace=1_000))
    state_id = store.put("x" * 900)
    assert store.update(state_id, "y" * 950).ok
    with pytest.raises(StateRefusedError, match="bytes of kind knowledge"):
        store.put("z" * 100)
    assert store.holdings("default", "knowledge")["bytes_left"] < 50


def test_sessions_that_are_only_named_take_no_place_from_those_that_are_put() -> None:
    store = World(None, host_bytes=1 << 19).open(settings=replace(SETTINGS, objects_per_namespace=2))
    chain = [bytes([i % 256, i // 256]) * 16 for i in range(1_000)]
    for i in range(80):
        store.note_session(f"s{i}", "a", chain)
    hints = [obj for obj in store.ls("a") if obj.is_hint]
    assert 0 < len(hints) < 80, "their records, too, take room: a quarter of what there is"
    assert filled(store, "a") == 2
    check_books(store)


# -- lists -------------------------------------------------------------------------------------------

NAMES = st.sampled_from([None, "n", "m"])
PUTS = st.tuples(st.sampled_from(["a", "b", "public"]), st.sampled_from(["knowledge", "kv"]), NAMES, st.integers(0, 2))


@given(st.lists(PUTS, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_pages_are_what_a_search_of_everything_finds(puts: list[Any], data: st.DataObject) -> None:
    world = World(None)
    store = world.open()
    for namespace, kind, name, ms in puts:
        world.wall.ms += ms
        given_ = {"kind": kind, "name": name, "namespace": namespace, "version": str(len(store.ls())) if name else None}
        store.put([1, 2] if kind == "kv" else "text", given_)
    if puts:
        store.drop(data.draw(st.sampled_from(store.ls())).state_id)
    every = sorted(store.plane.catalog.objects.values(), key=place_in_list)
    names = [None, *(obj.label for obj in every), *(obj.name for obj in every)]
    asked = data.draw(st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from([None, "knowledge", "kv"])))
    name, limit = data.draw(st.sampled_from(names)), data.draw(st.sampled_from([None, 1, 3]))
    after = data.draw(st.sampled_from([(), *(place_in_list(obj) for obj in every)]))
    namespace, kind = asked
    wanted = [
        obj
        for obj in every
        if (namespace is None or KIND_TABLE[obj.kind].visible_to(obj, namespace))
        and kind in (None, obj.kind)
        and name in (None, obj.name, obj.label)
        and place_in_list(obj) > after
    ]
    assert store.ls(namespace, kind, name=name, after=after, limit=limit) == wanted[:limit]


def test_a_page_does_not_look_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    store = World(None, host_bytes=8 << 20).open()
    for _ in range(500):
        store.put("x", {"namespace": "many"})
    for name in ("one", "two"):
        store.put("x", {"namespace": "few", "name": name})
    looked: list[str] = []
    real = KIND_TABLE["knowledge"].visible_to
    monkeypatch.setattr(
        type(KIND_TABLE["knowledge"]), "visible_to", lambda self, obj, ns: looked.append(obj.state_id) or real(obj, ns)
    )
    assert len(store.ls("few")) == 2 and store.ls("few", name="two")[0].name == "two"
    assert len(store.ls("many", limit=10)) == 10 and len(looked) <= 2 + 1 + 11


# -- whose KV ----------------------------------------------------------------------------------------


def shared_talk(store: StateStore, tokens: list[int], namespace: str) -> str:
    """A conversation of one tenant, computed where all tenants' KV lies."""
    return store.put(
        Session(TALK.messages, tokens), {"kind": "session", "namespace": namespace, "kv_namespace": "default"}
    )


def test_what_a_tenant_drops_takes_its_shared_kv_along(tmp_path: Path) -> None:
    """Two tenants whose KV lies in one namespace: what both own stays, what one owned alone goes."""
    store = World(tmp_path).open()
    opening, mine, yours = list(range(8)), [20, 21, 22, 23], [30, 31, 32, 33]
    for tokens in (opening + mine, opening + yours):
        spill(store, blocks_for(store, tokens), "disk")
    one, two = shared_talk(store, opening + mine, "a"), shared_talk(store, opening + yours, "b")
    assert store.find(one).chain == store.plane.chain_of(opening + mine, "default")
    assert store.explain(one).facts["same_model"]
    fork = store.fork(one)
    assert store.find(fork).chain == store.find(one).chain
    assert store.find(store.fork(one, {"namespace": "c"})).chain == store.plane.chain_of(opening + mine, "c")
    store.drop(fork)
    assert store.drop(one, "a").ok
    assert store.match(opening + mine).num_tokens == 8, "what the other one owns, too"
    assert store.match(opening + yours).num_tokens == 12
    assert store.update(two, Session(TALK.messages, yours), namespace="b", kv_namespace="b").ok
    assert store.find(two).chain == store.plane.chain_of(yours, "b") and store.match(opening).num_tokens == 0
    check_books(store)
    store.close()
    store = World(tmp_path).open()
    assert store.find(two).kv_namespace == "b" and not store.warnings
    store.close()
