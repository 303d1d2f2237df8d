"""What a plane learnt outlives it: speeds, popularity, pins, receipts; what is damaged or foreign is left aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.state.kinds.meta import BANDWIDTHS, PINS, POPULARITY, RECEIPTS
from nanovllm.state.learned import EVERY_MS, NAMESPACE, Part
from nanovllm.state.policies.gdsf import GDSF
from nanovllm.state.policies.lfu import LFU
from nanovllm.state.policies.lru import LRU
from nanovllm.state.policies.pgdsf import PGDSF
from nanovllm.state.policies.victims import Victims
from nanovllm.state.store import StateStore
from tests.state.fake_device import FakeDevice
from tests.state.policy_objects import Thing
from tests.state.stores import World, blocks_for, check_books, spill

TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
ALL = {BANDWIDTHS, POPULARITY, PINS, RECEIPTS}


def opened(world: World, identity: str | None = "me", **options: Any) -> StateStore:
    return world.open(identity=identity, **options)


def pins(store: StateStore) -> dict[tuple[str, str], int | None]:
    return {key: pin.until_ns for key, pin in store._residency.pins.items()}


def test_receipts_from_before_the_restart_are_told(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = opened(world)
    state_id = store.put("text", {"name": "doc"})
    for _ in range(20):
        store.get(state_id)
    before = store.explain(state_id)
    gone = store.put("another")
    store.drop(gone)
    store.close()
    store = opened(world)
    after = store.explain(state_id)
    assert after.receipts == before.receipts[-16:] and after.forgotten == 5
    store.get(state_id)
    assert store.explain(state_id).receipts[-1].seq > before.receipts[-1].seq
    assert gone not in dict.fromkeys(row[0] for row in store.plane.history.newest_first())
    store.close()
    looked_at = opened(world, identity=None)  # as the command line opens it
    assert [receipt.action for receipt in looked_at.explain(state_id).receipts][-1] == "get"
    looked_at.close()


def test_pins_go_on_with_the_time_they_have_left(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    device = FakeDevice()
    store = opened(world, device=device)
    spill(store, blocks_for(store, TOKENS), "disk")
    ids = [store.put(TOKENS, {"name": f"n{i}", "durable": True}) for i in range(4)]
    assert store.pin(ids[0], "disk", ttl=100).ok and store.pin(ids[1], "gpu").ok and store.pin(ids[2], "disk", ttl=5).ok
    assert store.pin(ids[3], "host").ok and store.pin(ids[3], "disk").ok and store.unpin(ids[3]).ok
    store.close()
    world.clock.advance(60 * 10**9)
    world.wall.ms += 60_000
    device = FakeDevice()
    store = opened(world, device=device)
    assert pins(store) == {(ids[0], "disk"): world.clock.now_ns() + 40 * 10**9, (ids[1], "device"): None}
    assert "0 of 3 blocks held" in store.explain(ids[1]).receipts[-1].reason
    blocks = blocks_for(store, TOKENS)
    device.compute(blocks)
    store.note_stored([block.digest for block in blocks])
    assert not any(device.discard(block.digest) for block in blocks)  # held as soon as they were there again
    world.clock.advance(40 * 10**9)
    store.tick()
    assert set(pins(store)) == {(ids[1], "device")}
    store.settle()
    check_books(store)
    store.close()


def test_a_pin_is_written_down_when_it_is_made(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = opened(world)
    state_id = store.put("text")
    assert store.pin(state_id, "disk").ok
    store.tick()
    for place in store.plane.places.values():  # as a kill would: nothing is written at the end
        place.close()
    assert set(pins(opened(world))) == {(state_id, "disk")}


@pytest.mark.parametrize("identity", ["another", "me"])
def test_what_another_machine_or_model_learnt_is_learnt_anew(tmp_path: Path, identity: str) -> None:
    world = World(tmp_path / "state")
    store = opened(world)
    store.plane.places["disk"].read_speed.observe(1_000_000, 2.0)
    state_id = store.put("text")
    store.pin(state_id, "disk")
    store.close()
    store = opened(world, identity)
    speed, is_same = store.plane.places["disk"].read_speed, identity == "me"
    assert (speed.bytes_per_ms == 500_000.0) == is_same and speed.label == "estimated"
    assert (not store.warnings) == is_same and all("another version, model" in warning for warning in store.warnings)
    assert set(pins(store)) == {(state_id, "disk")}  # the model does not matter to it
    speed.observe(30, 2.0)
    assert speed.label == "estimated"  # too small to tell
    speed.observe(3_000_000, 2.0)
    assert (speed.bytes_per_ms, speed.label) == (1_500_000.0, "measured")
    store.close()
    store = opened(world, identity)
    assert not store.warnings and store.plane.places["disk"].read_speed.bytes_per_ms == 1_500_000.0
    store.close()


@pytest.mark.parametrize(
    "text", [" ", "[]", "null", "{", '{"schema": 1}', '{"schema": 1, "identity": "me", "data": 7}']
)
def test_a_damaged_part_is_left_aside_with_a_warning(tmp_path: Path, text: str) -> None:
    world = World(tmp_path / "state")
    store = opened(world)
    store.put("text")
    store.close()
    store = opened(world)
    for obj in [obj for obj in store.ls() if obj.namespace == NAMESPACE]:
        store.update(obj.state_id, text)
    store._learned.parts.clear()
    store.close()
    store = opened(world)
    assert len(store.warnings) == len([obj for obj in store.ls() if obj.namespace == NAMESPACE]) > 0
    assert not pins(store) and len(store.ls("default")) == 1
    store.close()


def test_writing_waits_for_a_rest_and_writes_what_changed(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = opened(world)
    numbers = [1]
    store.learn(Part("numbers", lambda: list(numbers), numbers.extend))

    def generation() -> int:
        return next((obj.generation for obj in store.ls(NAMESPACE) if obj.name == "numbers"), 0)

    for waited, expected in ((0, 0), (EVERY_MS, 1), (EVERY_MS, 1)):
        world.wall.ms += waited
        store.tick()  # busy: it is put off
        store.rest()
        assert generation() == expected
    numbers.append(2)
    store.rest()
    assert generation() == 1
    world.wall.ms += EVERY_MS
    store.rest()
    assert generation() == 2
    store.close()


def test_nothing_is_written_without_an_identity_or_without_a_folder(tmp_path: Path) -> None:
    store = opened(World(tmp_path / "state"), None)
    store.pin(store.put("text"), "disk")
    store.close()
    store = opened(World(tmp_path / "state"), None)
    assert not store.ls(NAMESPACE) and not pins(store)
    store.close()


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60))
def test_policies_know_after_a_restart_who_goes_first(uses: list[tuple[int, bool]]) -> None:
    things = [Thing(str(i)) for i in range(10)]
    for make in (LRU, LFU, GDSF, lambda: PGDSF(lambda cached, new: 3.0 * new)):
        before, after = Victims({"kv": make()}), Victims({"kv": make()})
        for number, hit in uses:
            before.touch(things[number], 0, 4, hit)
        for thing in things:
            if thing.key in before:
                after.touch(thing, 0, 4, False)
        after.recall("kv", before.memory(100)["kv"])
        order = [obj.key for _, obj in before.ranked("kv", 10)]
        scores = {obj.key: score for score, obj in before.ranked("kv", 10)}
        again = {obj.key: score for score, obj in after.ranked("kv", 10)}
        ranked = sorted(order, key=lambda key: again[key])
        assert [scores[key] for key in ranked] == sorted(scores.values())
        assert before.memory(3)["kv"] == before.memory(100)["kv"][-3:]
