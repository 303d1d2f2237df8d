"""The state plane against a dictionary: every verb in any order, with restarts, on a virtual clock."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from nanovllm.errors import StateNotFoundError, StateRefusedError
from nanovllm.state.learned import NAMESPACE
from nanovllm.state.objects import Document, Session
from tests.state.fake_device import FakeDevice
from tests.state.stores import World, blocks_for, check_books, computed, loaded, spill

LONG = (pytest.mark.long, pytest.mark.timeout(1800))

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=20)  # few values: prefixes are shared
TEXT = st.text(min_size=1, max_size=40)
THINGS = st.one_of(
    TEXT,
    TOKENS,
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}), min_size=1, max_size=3),
    st.builds(Document, TEXT, TOKENS),
    st.builds(lambda text, tokens: Session([{"role": "user", "content": text}], tokens), TEXT, TOKENS),
)


class StoreMachine(RuleBasedStateMachine):
    """What was put is got back, until it is dropped or expires; KV is right or absent."""

    ids = Bundle("ids")
    parent: Path
    threads = False

    @initialize(with_device=st.booleans())
    def begin(self, with_device: bool) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.parent)) / "state"
        self.world = World(folder, host_bytes=12_000, disk_bytes=4 << 20)
        self.device = FakeDevice() if with_device else None
        self.store = self.world.open(device=self.device, threads=self.threads, identity="me")
        self.model: dict[str, object] = {}
        self.volatile: set[str] = set()

    @rule(target=ids, thing=THINGS, namespace=st.sampled_from(["a", "b"]), kv=st.sampled_from([None, "a", "b"]))
    def put(self, thing: object, namespace: str, kv: str | None) -> object:
        before = self.store.ls()
        try:
            state_id = self.store.put(thing, {"namespace": namespace, "kv_namespace": kv})
        except StateRefusedError as refused:
            assert not refused.receipt.ok and self.store.ls() == before
            return multiple()
        assert state_id.receipt.ok and state_id not in self.model
        self.model[state_id] = thing
        if not self.store.find(state_id).durable:
            self.volatile.add(state_id)
        return state_id

    @rule(state_id=ids)
    def get(self, state_id: str) -> None:
        if state_id in self.model:
            assert self.store.get(state_id) == self.model[state_id]
        else:
            with pytest.raises(StateNotFoundError):
                self.store.get(state_id)

    @rule(state_id=ids, text=TEXT)
    def update(self, state_id: str, text: str) -> None:
        if isinstance(self.model.get(state_id), Session):
            old = self.store.find(state_id).generation
            new = Session([{"role": "user", "content": text}], [1, 2, 0, 1])
            assert self.store.update(state_id, new, generation=old).ok
            self.model[state_id] = new

    @rule(state_id=consumes(ids))
    def drop(self, state_id: str) -> None:
        if state_id in self.model:
            catalog = self.store.plane.catalog
            owned = [key for key in self.store.find(state_id).chain if catalog.owners(key) == {state_id}]
            assert self.store.drop(state_id).ok
            assert not any(key in catalog.entries for key in owned)
            del self.model[state_id]

    @rule(target=ids, state_id=ids)
    def fork(self, state_id: str) -> object:
        if state_id not in self.model:
            return multiple()
        try:
            new = self.store.fork(state_id)
        except StateRefusedError:
            return multiple()
        self.model[new] = self.model[state_id]
        if state_id in self.volatile:
            self.volatile.add(new)
        return new

    @rule(target=ids, state_id=ids)
    def export_and_import(self, state_id: str) -> object:
        if state_id not in self.model:
            return multiple()
        try:
            new = self.store.import_(self.store.export(state_id), {"namespace": "b"})
        except StateRefusedError:
            return multiple()
        self.model[new] = self.model[state_id]
        if not self.store.find(new).durable:
            self.volatile.add(new)
        return new

    @rule(tokens=TOKENS, namespace=st.sampled_from(["a", "b"]), tier=st.sampled_from(["host", "disk"]))
    def compute(self, tokens: list[int], namespace: str, tier: str) -> None:
        blocks = blocks_for(self.store, tokens, namespace)
        if self.device is not None:
            self.device.compute(blocks[: self.device.num_blocks // 2])
            self.store.note_stored([block.digest for block in blocks])
        spill(self.store, blocks, tier)
        self.store.touch([block.digest for block in blocks], 0, len(tokens), hit=False)

    @rule(tokens=TOKENS, namespace=st.sampled_from(["a", "b"]), session=st.sampled_from(["one", "two"]))
    def name_a_session(self, tokens: list[int], namespace: str, session: str) -> None:
        self.store.note_session(session, namespace, self.store.plane.chain_of(tokens, namespace))

    @rule(namespace=st.sampled_from(["a", "b"]), session=st.sampled_from(["one", "two"]))
    def forget_a_session(self, namespace: str, session: str) -> None:
        self.store.settle()
        hint = self.store.plane.catalog.named(namespace, "session", session, None)
        if hint is not None:
            owned = [key for key in hint.chain if self.store.plane.catalog.owners(key) == {hint.state_id}]
            assert self.store.drop(hint.state_id).ok
            assert not any(key in self.store.plane.catalog.entries for key in owned)

    @rule(tokens=TOKENS, namespace=st.sampled_from(["a", "b"]))
    def match_and_load(self, tokens: list[int], namespace: str) -> None:
        match = self.store.match(tokens, namespace)
        blocks = blocks_for(self.store, tokens, namespace)[: len(match.tiers)]
        below = [block for block, tier in zip(blocks, match.tiers) if tier != "device"]
        assert loaded(self.store, below) == len(below)

    @rule(kind=st.sampled_from([None, "kv", "knowledge"]), size=st.sampled_from([None, 1000]), data=st.data())
    def evict(self, kind: str | None, size: int | None, data: st.DataObject) -> None:
        policy = data.draw(st.sampled_from([None, "lru", "lfu", "gdsf"]))
        tier = data.draw(st.sampled_from([None, "host", "disk"]))
        receipt = self.store.evict(policy=policy, kind=kind, bytes=size, tier=tier)
        assert receipt.ok == (receipt.size_bytes >= (size or 1))

    @rule(state_id=ids, where=st.sampled_from(["gpu", "host", "disk"]), ttl=st.sampled_from([None, 5.0]))
    def pin(self, state_id: str, where: str, ttl: float | None) -> None:
        if state_id in self.model:
            self.store.pin(state_id, device=where, ttl=ttl)

    @rule(state_id=ids)
    def unpin(self, state_id: str) -> None:
        if state_id in self.model:
            pinned = bool(self.store._residency.pins_of(state_id))
            assert self.store.unpin(state_id).ok == pinned

    @rule(state_id=ids, tier=st.sampled_from(["host", "disk"]))
    def migrate(self, state_id: str, tier: str) -> None:
        if state_id in self.model:
            self.store.migrate(state_id, tier)

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds: int) -> None:
        self.world.clock.advance(seconds * 10**9)
        self.world.wall.ms += seconds * 1000
        self.store.tick()

    @rule()
    def restart(self) -> None:
        pins = {key for key in self.store._residency.pins if key[1] != "host"}
        self.store.close()
        self.device = None if self.device is None else FakeDevice()
        self.store = self.world.open(device=self.device, threads=self.threads, identity="me")
        assert not self.store.warnings
        here = {obj.state_id for obj in self.store.ls() if obj.namespace != NAMESPACE and not obj.is_hint}
        assert {key for key in self.store._residency.pins if key[1] != "host"} == {
            key for key in pins if key[0] in here
        }
        for state_id in self.volatile - here:  # one that was migrated to the disk may have survived
            self.model.pop(state_id, None)
        self.volatile &= here
        assert here == set(self.model)

    @rule()
    def verify(self) -> None:
        assert self.store.verify().ok

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "store"):
            self.store.poll()
            while self.threads and self.store.plane.mover.num_pending:
                self.store.poll()
            check_books(self.store)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for state_id, thing in self.model.items():
                assert self.store.get(state_id) == thing
            for obj in self.store.ls():
                self.store.drop(obj.state_id)
            assert not self.store.plane.catalog.objects and not self.store.plane.catalog._owners
            assert not self.store._residency.pins
            self.store.close()


def run(tmp_path: Path, examples: int, steps: int, *, threads: bool) -> None:
    machine = type("Machine", (StoreMachine,), {"parent": tmp_path, "threads": threads})
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=slow)
    run_state_machine_as_test(machine, settings=options)


@pytest.mark.parametrize(("examples", "steps"), [(12, 20), pytest.param(200, 50, marks=LONG)])
def test_every_verb_in_any_order(tmp_path: Path, examples: int, steps: int) -> None:
    run(tmp_path, examples, steps, threads=False)


@pytest.mark.parametrize(("examples", "steps"), [(5, 15), pytest.param(100, 40, marks=LONG)])
def test_every_verb_in_any_order_on_threads(tmp_path: Path, examples: int, steps: int) -> None:
    run(tmp_path, examples, steps, threads=True)


def test_the_fake_device_refuses_wrong_bytes() -> None:
    store = World(None).open()
    (block, data), *_ = computed(blocks_for(store, [1, 2, 3, 4]))
    with pytest.raises(AssertionError, match="wrong bytes"):
        FakeDevice().load([block], [data[:-1] + b"\0"])
    store.close()
