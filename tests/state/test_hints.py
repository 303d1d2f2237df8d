"""Sessions that requests only name: small records that own blocks, bounded, over restarts, gone when dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.errors import StateNotFoundError
from nanovllm.state.objects import Session
from nanovllm.state.settings import StateSettings
from nanovllm.state.store import StateStore
from tests.state.fake_device import FakeDevice
from tests.state.stores import SETTINGS, World, blocks_for, check_books, spill

TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def chain_of(store: StateStore, tokens: list[int], namespace: str = "a") -> tuple[bytes, ...]:
    return store.plane.chain_of(tokens, namespace)


def kinds(store: StateStore) -> dict[str, int]:
    return store.plane.places["disk"].by_kind


def world(tmp_path: Path, **settings: object) -> tuple[World, StateSettings]:
    fields = {name: getattr(SETTINGS, name) for name in SETTINGS.__dataclass_fields__}
    return World(tmp_path / "state"), StateSettings(**{**fields, **settings})  # type: ignore[arg-type]


def test_a_session_owns_its_requests_blocks_over_a_restart_and_takes_them_with_it(tmp_path: Path) -> None:
    here, settings = world(tmp_path)
    store = here.open(settings=settings)
    spill(store, blocks_for(store, TOKENS, "a"), "disk")
    assert kinds(store) == {"kv": kinds(store)["kv"]}
    store.note_session("talk", "a", chain_of(store, TOKENS[:8]))
    assert set(kinds(store)) == {"kv", "session"}
    check_books(store)
    store.close()

    store = here.open(settings=settings)
    obj = store.find("talk", "a")
    assert obj.is_hint and obj.num_tokens == 8 and store.get("talk", "a") == Session([], [])
    assert store.explain("talk", "a").facts["blocks_in"] == {"disk": 2} and set(kinds(store)) == {"kv", "session"}
    with pytest.raises(StateNotFoundError):
        store.find("talk", "b")
    assert store.drop("talk", "a").ok
    assert store.match(TOKENS, "a").num_tokens == 0 and list(kinds(store)) == ["kv"]  # the third block's prefix is gone
    check_books(store)
    store.close()


def test_what_two_sessions_share_stays_until_both_are_gone(tmp_path: Path) -> None:
    here, settings = world(tmp_path)
    store = here.open(settings=settings)
    spill(store, blocks_for(store, TOKENS, "a"), "disk")
    store.note_session("one", "a", chain_of(store, TOKENS))
    store.note_session("two", "a", chain_of(store, TOKENS[:8]))
    assert store.drop("one", "a").ok and store.match(TOKENS, "a").num_tokens == 8
    assert store.drop("two", "a").ok and store.match(TOKENS, "a").num_tokens == 0
    store.close()


def test_a_later_turn_adds_to_the_record_and_its_time(tmp_path: Path) -> None:
    here, settings = world(tmp_path, hint_blocks=4)
    store = here.open(settings=settings)
    store.note_session("talk", "a", chain_of(store, TOKENS))
    first = store.find("talk", "a")
    here.wall.ms += 1000
    other = chain_of(store, [9, *TOKENS])
    store.note_session("talk", "a", other)
    second = store.find("talk", "a")
    assert second.state_id == first.state_id and second.generation == 2
    assert second.chain == (*other, first.chain[0]) and second.expires_ms == first.expires_ms + 1000
    here.wall.ms += 86_400_000
    store.tick()
    assert not store.ls("a")
    store.close()


def test_the_conversation_of_that_name_is_left_alone_and_takes_a_hints_place(tmp_path: Path) -> None:
    here, settings = world(tmp_path)
    store = here.open(settings=settings)
    spill(store, blocks_for(store, TOKENS, "a"), "disk")
    store.note_session("talk", "a", chain_of(store, TOKENS))
    talk = Session([{"role": "user", "content": "hi"}], TOKENS[:8])
    state_id = store.put(talk, {"name": "talk", "namespace": "a"})
    store.note_session("talk", "a", chain_of(store, TOKENS))
    assert [obj.state_id for obj in store.ls("a")] == [state_id] and store.get(state_id) == talk
    assert store.match(TOKENS, "a").num_tokens == 8  # what only the hint owned went with it
    check_books(store)
    store.close()


@pytest.mark.parametrize("where", ["disk", "device"])
@pytest.mark.parametrize("other", [None, "response", "kv", "tenant"])
def test_a_dropped_conversation_leaves_nothing_to_a_hint_but_what_others_own(
    tmp_path: Path, where: str, other: str | None
) -> None:
    """Neither its blocks nor what the hint's requests computed behind them; its other requests stay."""
    here, settings = world(tmp_path)
    device = FakeDevice(num_blocks=32)
    store = here.open(settings=settings, device=device)
    longer, apart = [*TOKENS, 77, 78, 79, 80], [5, *TOKENS]
    for tokens in (longer, apart):
        if where == "disk":
            spill(store, blocks_for(store, tokens, "a"), "disk")
        else:
            device.compute(blocks_for(store, tokens, "a"))
    talk = store.put(Session([], TOKENS[:8]), {"namespace": "a"})
    store.note_session("hint", "a", chain_of(store, apart))
    store.note_session("hint", "a", chain_of(store, longer))
    if other == "response":
        store.put(Session([], TOKENS[:4]), {"namespace": "a"})
    elif other == "kv":
        store.put(longer, {"kind": "kv", "namespace": "a"})
    elif other == "tenant":
        store.note_session("theirs", "b", chain_of(store, TOKENS))
    assert store.drop(talk).ok
    store.tick()
    kept = {None: 0, "response": 4, "kv": 16, "tenant": 12}[other]
    assert store.match(longer, "a").num_tokens == kept and store.match(apart, "a").num_tokens == 12
    chain = chain_of(store, longer)
    assert [device.holds(key) or key in store.plane.catalog.entries for key in chain].count(True) == kept // 4
    assert set(store.find("hint", "a").chain) == {*chain_of(store, apart), *chain[: kept // 4]} - (
        {*chain} if other == "tenant" else set()
    )
    check_books(store)
    store.close()


def test_what_a_conversation_names_no_more_is_left_to_no_hint(tmp_path: Path) -> None:
    here, settings = world(tmp_path)
    store = here.open(settings=settings)
    spill(store, blocks_for(store, TOKENS, "a"), "disk")
    talk = store.put(Session([], TOKENS), {"namespace": "a"})
    store.note_session("hint", "a", chain_of(store, TOKENS))
    store.update(talk, Session([], TOKENS[:4]))
    assert store.match(TOKENS, "a").num_tokens == 4 == store.find("hint", "a").num_tokens
    check_books(store)
    store.close()


def test_a_hint_does_not_bring_back_what_goes_when_its_request_ends(tmp_path: Path) -> None:
    here, settings = world(tmp_path)
    device = FakeDevice()
    store = here.open(settings=settings, device=device)
    device.compute(blocks_for(store, TOKENS, "a"))
    talk = store.put(Session([], TOKENS[:8]), {"namespace": "a"})
    chain = chain_of(store, TOKENS)
    lease = device.hold(list(chain), "sequence")
    assert store.drop(talk).detail["blocks_in_use"] == 2
    store.note_session("hint", "a", chain)
    assert not store.ls("a")
    device.release(lease)  # type: ignore[arg-type]
    store.tick()
    assert not any(device.holds(digest) for digest in chain[:2])
    store.close()


def test_records_are_bounded_and_strange_names_have_a_sum(tmp_path: Path) -> None:
    here, settings = world(tmp_path, hints_per_namespace=3)
    store = here.open(settings=settings)
    for i in range(5):
        here.wall.ms += 1
        store.note_session(f"someone@example.org {i}", "a", chain_of(store, [i, *TOKENS]))
    names = [obj.name for obj in store.ls("a")]
    assert len(names) == 3 and all(name is not None and name.startswith("session-") for name in names)
    store.note_session("nothing", "a", ())
    assert len(store.ls("a")) == 3
    store.close()


def test_turns_that_end_together_are_one_record(tmp_path: Path) -> None:
    here, settings = world(tmp_path)
    store = here.open(settings=settings, threads=True)
    chains = [chain_of(store, [i, *TOKENS]) for i in range(4)]
    for chain in chains:
        store.note_session("talk", "a", chain)
    store.settle()
    (obj,) = store.ls("a")
    assert set(obj.chain) == {digest for chain in chains for digest in chain} and obj.generation == 2
    store.close()


def test_dropping_a_session_ends_the_pins_on_it(tmp_path: Path) -> None:
    here, settings = world(tmp_path)
    device = FakeDevice()
    store = here.open(settings=settings, device=device)
    device.compute(blocks_for(store, TOKENS, "a"))
    store.note_session("talk", "a", chain_of(store, TOKENS))
    assert store.pin("talk", namespace="a").ok and not device.discard(chain_of(store, TOKENS)[0])
    store.put(Session([], TOKENS), {"name": "talk", "namespace": "a"})  # takes its place
    assert not store._residency.pins and device.discard(chain_of(store, TOKENS)[-1])
    store.close()
