"""What each verb promises, one test a promise: names, tenants, pins, moves, reclaim, receipts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.errors import (
    InvalidRequestError,
    StateBundleError,
    StateConflictError,
    StateNotFoundError,
    StateRefusedError,
)
from nanovllm.state.kinds.table import COLUMNS, KIND_TABLE, table_rows
from nanovllm.state.objects import KINDS, PUBLIC, Document, Session
from nanovllm.state.settings import StateSettings
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.host import HostTier
from nanovllm.state.tiers.remote import RemoteTier
from tests.state.fake_device import FakeDevice
from tests.state.servers import needs_server, running_server
from tests.state.stores import SETTINGS, World, blocks_for, check_books, loaded, spill

TOKENS = list(range(16))  # four blocks


def test_put_pin_evict_explain() -> None:
    """The six lines of the README, on a fake device."""
    store = World(None).open(device=FakeDevice())
    state_id = store.put(Document("The HUST library opens at 8.", TOKENS), {"name": "library", "version": "1"})
    pinned = store.pin(state_id, device="gpu", ttl=60)
    evicted = store.evict(policy="lru")
    story = store.explain("library@1", namespace="default")
    assert (
        pinned.ok and pinned.reason == "0 of 4 blocks held on the device; the other 4 when they are computed, for 60 s"
    )
    assert not evicted.ok and evicted.reason == "nothing may go: all is held"
    assert [receipt.action for receipt in story.receipts] == ["put", "pin"]
    assert story.facts["blocks"] == 4 and story.facts["pins"] == [{"tier": "device", "until_ns": 60 * 10**9}]


@pytest.mark.parametrize("bad", [None, 3, 2.5, b"bytes", {"role": "user"}, [], [1.5], ["text"], [[1]], object(), {1}])
def test_what_is_no_state_is_a_type_error(bad: object) -> None:
    store = World(None).open()
    with pytest.raises(TypeError, match="put takes text, token ids, messages, a Document or a Session"):
        store.put(bad)
    assert not store.ls()


@pytest.mark.parametrize(
    ("obj", "metadata", "param"),
    [
        ("text", {"kind": "kv"}, "kind"),
        ([1, 2], {"kind": "session"}, "kind"),
        ("", {}, "obj"),
        ("lone \ud800", {}, "obj"),
        ([{"role": "user", "content": "\udfff"}], {}, "obj"),
        ([{"n": b"bytes"}], {}, "obj"),
        ([{"n": {1: 2}}], {}, "obj"),
        ([{"n": float("nan")}], {}, "obj"),
        ([{"n": [float("-inf")]}], {}, "obj"),
        ("x" * (5 << 20), {}, "obj"),
        ([True, False], {}, "obj"),
    ],
)
def test_a_bad_object_is_refused_and_leaves_nothing(obj: object, metadata: dict, param: str) -> None:
    store = World(None).open()
    with pytest.raises(InvalidRequestError) as caught:
        store.put(obj, metadata)
    assert caught.value.param == param and not store.ls() and not store.plane.catalog.entries


def test_a_name_is_an_alias_of_the_newest_version(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = world.open()
    first = store.put("one", {"name": "doc", "version": "1"})
    world.wall.ms += 1
    second = store.put("two", {"name": "doc", "version": "2"})
    assert store.get("doc", namespace="default") == "two" and store.get("doc@1", namespace="default") == "one"
    world.wall.ms += 1
    third = store.put("two, mended", {"name": "doc", "version": "2"})
    assert store.get("doc@2", namespace="default") == "two, mended"
    with pytest.raises(StateNotFoundError):
        store.get(second)
    assert store.explain(third).receipts[0].ok and {obj.state_id for obj in store.ls()} == {first, third}
    store.close()
    store = world.open()
    assert store.get("doc", namespace="default") == "two, mended"
    store.drop(third)
    assert store.get("doc", namespace="default") == "one"
    with pytest.raises(StateConflictError, match="already"):
        for _ in range(2):
            store.put([{"role": "user", "content": "hi"}], {"name": "chat"})
    store.close()


def test_a_session_has_one_writer_per_generation() -> None:
    store = World(None).open()
    state_id = store.put(Session([{"role": "user", "content": "1"}], TOKENS[:8]))
    assert store.update(state_id, Session([{"role": "user", "content": "2"}], TOKENS), generation=1).ok
    with pytest.raises(StateConflictError, match="generation 2, not 1"):
        store.update(state_id, Session([{"role": "user", "content": "also 2"}]), generation=1)
    assert store.get(state_id).messages[0]["content"] == "2" and len(store.find(state_id).chain) == 4


def test_tenants_see_their_own_and_public_documents() -> None:
    store = World(None).open()
    secret = store.put("secret", {"namespace": "a", "name": "doc"})
    public = store.put("for all", {"namespace": PUBLIC, "name": "manual"})
    talk = store.put([{"role": "user", "content": "hi"}], {"namespace": PUBLIC})
    assert store.get(secret, namespace="a") == "secret" and store.get(public, namespace="b") == "for all"
    assert store.get("manual", namespace="b") == "for all"
    for state_id, who in ((secret, "b"), ("doc", "b"), (talk, "b"), ("0" * 32, "a"), ("../../etc/passwd", "a")):
        for verb in (store.get, store.drop, store.explain, store.pin, store.unpin, store.export, store.fork):
            with pytest.raises(StateNotFoundError, match="There is no state"):
                verb(state_id, namespace=who)
    assert {obj.state_id for obj in store.ls(namespace="b")} == {public}
    mine = store.fork(public, {"namespace": "b"}, namespace="b")  # read by all, changed by its owner
    for verb in (store.drop, store.explain, store.pin, store.unpin, lambda *a, **n: store.update(public, "x", **n)):
        with pytest.raises(StateNotFoundError, match="of yours"):
            verb(public, namespace="b")
    assert store.get(public) == "for all" and store.drop(mine, namespace="b").ok
    spill(store, blocks_for(store, TOKENS, "a"))
    assert store.match(TOKENS, "a").num_tokens == 16 and store.match(TOKENS, "b").num_tokens == 0


def test_time_to_live_and_a_pins_time(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = world.open()
    short, long = store.put("short", {"ttl": 5}), store.put("long", {"ttl": 100})
    assert store.pin(long, "host", ttl=10).ok
    world.wall.ms += 5000
    with pytest.raises(StateNotFoundError):
        store.get(short)
    world.clock.advance(10 * 10**9)
    store.tick()
    assert not store.explain(long).facts["pins"]
    assert [receipt.reason for receipt in store.explain(long).receipts][-1] == "its time is over"
    store.update(long, "longer")
    renewed, never = store.put("renewed", {"ttl": 20}), store.put("never")
    world.wall.ms += 15_000
    store.update(renewed, "renewed", namespace="default")  # its time begins anew
    world.wall.ms += 15_000
    store.tick()
    assert {obj.state_id for obj in store.ls()} == {long, renewed, never}
    store.drop(never)
    store.close()
    world.wall.ms += 100_000  # it ends while nobody runs
    store = world.open()
    assert not store.ls() and not list((tmp_path / "state" / "texts").iterdir())
    store.close()


def test_a_fork_has_the_time_and_the_place_that_were_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = world.open()
    first = store.put("text", {"name": "t", "version": "1", "ttl": 100})
    world.wall.ms += 60_000
    same, brief = store.fork(first), store.fork(first, {"name": "brief", "ttl": 5, "durable": False})
    assert [store.find(one).expires_ms - world.wall.ms for one in (first, same, brief)] == [40_000, 100_000, 5_000]
    assert [store.find(one).durable for one in (first, same, brief)] == [True, True, False]
    assert store.find(store.fork(brief, {"durable": True})).durable
    world.wall.ms += 5_000
    store.tick()
    assert brief not in {obj.state_id for obj in store.ls()}
    with pytest.raises(InvalidRequestError, match="kind") as refused:
        store.fork(first, {"kind": "kv"})
    assert refused.value.param == "kind" and store.fork(first, {"kind": "knowledge"})
    store.close()
    with pytest.raises(StateRefusedError, match="no tier"):  # as a put that must be durable
        memory = World(None).open()
        memory.fork(memory.put("text"), {"durable": True})


def test_a_fork_does_not_put_its_original_out() -> None:
    store = World(None).open()
    first = store.put("text", {"name": "t", "version": "1"})
    other = store.put("other", {"name": "t", "version": "2"})
    with pytest.raises(StateConflictError, match="called 't@1'") as refused:
        store.fork(first, {"name": "t", "version": "1"})
    assert refused.value.param == "name" and store.get("t@1", "default") == "text"
    store.fork(first, {"name": "t", "version": "2"})  # as a put: the newer takes the name
    assert store.get("t@2", "default") == "text" and other not in {obj.state_id for obj in store.ls()}
    assert store.get(store.fork(first, {"name": "t", "version": "1", "namespace": "b"})) == "text"
    talk = store.put([{"role": "user", "content": "hi"}], {"name": "talk"})
    store.put([{"role": "user", "content": "ho"}], {"name": "taken"})
    for name in ("talk", "taken"):
        with pytest.raises(StateConflictError):
            store.fork(talk, {"name": name})


def test_a_pin_beyond_its_share_is_refused_with_a_receipt() -> None:
    device = FakeDevice(num_blocks=8)
    store = World(None).open(device=device)
    ids = [store.put([i] * 12) for i in range(3)]  # three blocks each, four may be pinned
    assert store.pin(ids[0]).ok
    refused = store.pin(ids[1], device="cuda")
    assert not refused.ok and "more than the 960 that pins may hold" in refused.reason
    assert store.pin(ids[0]).ok, "renewing needs no more room"
    assert store.unpin(ids[0]).ok and not store.unpin(ids[0]).ok and store.pin(ids[1]).ok
    assert not store.pin(store.put("no tokens")).ok
    with pytest.raises(InvalidRequestError, match="no tier"):
        store.pin(ids[0], device="tape")
    offline = World(None).open()
    assert "only an engine has one" in offline.pin(offline.put([1, 2, 3, 4])).reason


def test_a_device_pin_loads_what_lies_below_and_waits_for_the_rest() -> None:
    device = FakeDevice()
    store = World(None).open(device=device)
    state_id, blocks = store.put(TOKENS), None
    blocks = blocks_for(store, TOKENS)
    spill(store, blocks[:2], "host")
    assert "2 of 4 blocks held" in store.pin(state_id).reason
    assert device.holds_on == {blocks[0].digest: 1, blocks[1].digest: 1}
    device.compute(blocks[2:])
    store.note_stored([block.digest for block in blocks[2:]])
    assert all(device.holds_on[block.digest] == 1 for block in blocks)
    assert not store.evict(tier="device").ok
    assert store.drop(state_id).detail["blocks_in_use"] == 0 and not any(device.holds(b.digest) for b in blocks)


def test_dropping_spares_what_others_own_and_waits_for_what_runs() -> None:
    device = FakeDevice()
    store = World(None).open(device=device)
    mine, yours = store.put(TOKENS), store.put(TOKENS[:8])
    blocks = blocks_for(store, TOKENS)
    device.compute(blocks)
    spill(store, blocks, "host")
    running = device.hold([blocks[3].digest], "a sequence")
    receipt = store.drop(mine)
    assert receipt.ok and receipt.detail["blocks_in_use"] == 1
    assert store.match(TOKENS).num_tokens == 8 and [device.holds(b.digest) for b in blocks] == [True, True, False, True]
    device.release(running)
    store.tick()
    assert not device.holds(blocks[3].digest) and store.get(yours) == TOKENS[:8]


def test_reclaim_is_leaf_first_demotes_what_is_worth_it_and_says_so(tmp_path: Path) -> None:
    store = World(tmp_path / "state", host_bytes=6000).open()
    blocks = blocks_for(store, TOKENS, cost_ms=50.0)
    spill(store, blocks, "host")
    cheap = blocks_for(store, [7] * 4, cost_ms=1e-6)
    spill(store, cheap, "host")
    first = store.evict(tier="host", kind="kv")
    assert first.ok and first.candidates[0].verdict == "moved" and first.candidates[0].reason == "to disk"
    assert first.candidates[0].key == blocks[3].digest.hex()[:16], "the leaf, not the prefix"
    assert {c.verdict for c in first.candidates[1:]} == {"kept"}
    assert store.match(TOKENS).tiers == ("host", "host", "host", "disk") and loaded(store, blocks) == 4
    receipts = [store.evict(tier="host", kind="kv") for _ in range(4)]
    assert [r.candidates[0].verdict for r in receipts].count("evicted") == 1, "loading costs more than computing it"
    assert not store.match([7] * 4).tiers and store.match(TOKENS).tiers == ("disk",) * 4
    check_books(store)
    store.close()


def test_evicting_without_an_amount_takes_one_object(tmp_path: Path) -> None:
    store = World(tmp_path / "state").open()
    old, new = store.put(TOKENS), store.put([50 + t for t in TOKENS])
    for tokens in (TOKENS, [50 + t for t in TOKENS]):
        spill(store, blocks_for(store, tokens), "disk")
    receipt = store.evict(policy="lru", kind="kv", tier="disk")
    assert receipt.ok and sum(c.verdict == "evicted" for c in receipt.candidates) == 4
    assert store.match(TOKENS).num_tokens == 0 and store.match([50 + t for t in TOKENS]).num_tokens == 16
    assert store.get(old) == TOKENS and store.explain(old).receipts[-2].action == "evict"
    assert store.explain(new).receipts[-1].candidates[-1].verdict == "kept"
    with pytest.raises(Exception, match="no policy 'belady'"):
        store.evict(policy="belady")
    with pytest.raises(InvalidRequestError, match="kind must be"):
        store.evict(kind="index")
    store.close()


def test_the_last_copy_of_a_text_never_goes() -> None:
    store = World(None, host_bytes=3000).open()
    kept = store.put("x" * 1000)
    assert not store.evict().ok and store.get(kept) == "x" * 1000
    with pytest.raises(StateRefusedError, match=r"host has .* bytes left") as caught:
        for _ in range(3):
            store.put("y" * 1000)
    assert not caught.value.receipt.ok and caught.value.status == 507
    with pytest.raises(StateRefusedError, match="no tier for it"):
        store.put("z", {"durable": True})
    assert store.get(kept) == "x" * 1000
    check_books(store)


def test_a_tenants_flood_takes_its_own_first() -> None:
    store = World(None, host_bytes=1 << 20).open(
        settings=StateSettings(block_size=4, layout=SETTINGS.layout, layers=3, namespace_bytes=4000)
    )
    spill(store, blocks_for(store, TOKENS, "victim"))
    for i in range(50):
        spill(store, blocks_for(store, [i] * 4, "flood"))
    assert store.match(TOKENS, "victim").num_tokens == 16
    assert store.plane.places["host"].by_namespace["flood"] <= 4000


def test_objects_per_tenant_are_bounded() -> None:
    store = World(None).open(settings=StateSettings(objects_per_namespace=2))
    ids = [store.put("a", {"namespace": "a"}), store.put("b", {"namespace": "a"})]
    with pytest.raises(StateRefusedError, match="2 objects of kind knowledge already"):
        store.put("c", {"namespace": "a"})
    store.put("c", {"namespace": "b"})
    store.drop(ids[0])
    store.put("c", {"namespace": "a"})


def test_migrate_moves_down_and_up(tmp_path: Path) -> None:
    store = World(tmp_path / "state").open()
    state_id, blocks = store.put(TOKENS), blocks_for(store, TOKENS)
    assert store.migrate(state_id, "host").ok, "its tokens are there"
    spill(store, blocks, "host")
    down = store.migrate(state_id, "disk")
    assert down.ok and down.size_bytes > 4 * 240 and store.match(TOKENS).tiers == ("disk",) * 4
    assert store.migrate(state_id, "host").ok and store.match(TOKENS).tiers == ("host",) * 4
    with pytest.raises(InvalidRequestError, match=r"There are host, disk"):
        store.migrate(state_id, "tape")
    check_books(store)
    store.close()


def test_another_model_keeps_the_text_misses_the_kv_and_says_so(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = world.open()
    state_id = store.put(Document("text", TOKENS))
    blocks = blocks_for(store, TOKENS)
    spill(store, blocks, "disk")
    store.close()
    store = world.open(model="another")
    assert "computed with another model" in store.warnings[0] and not store.explain(state_id).facts["same_model"]
    assert store.get(state_id) == Document("text", TOKENS) and store.match(TOKENS).num_tokens == 0
    store.close()
    for settings in (StateSettings(4, "another layout", 3), StateSettings(2, SETTINGS.layout, 3)):
        store = world.open(settings=settings)
        assert store.match(TOKENS).num_tokens == 0 and loaded(store, blocks) == 0
        store.close()


def test_restart_keeps_everything_that_was_on_the_disk(tmp_path: Path) -> None:
    """S10 at this level: three restarts, and every block is still found."""
    world = World(tmp_path / "state")
    store = world.open()
    blocks = blocks_for(store, TOKENS * 8)
    spill(store, blocks, "disk")
    for _ in range(3):
        store.close()
        store = world.open()
        assert store.match(TOKENS * 8).num_tokens == 128 and loaded(store, blocks) == 32
    store.close()


def test_an_export_is_taken_in_whole_or_not_at_all(tmp_path: Path) -> None:
    """S13: 100 damaged bundles leave no trace."""
    store = World(tmp_path / "a").open()
    state_id = store.put(Session([{"role": "user", "content": "hi"}], TOKENS))
    spill(store, blocks_for(store, TOKENS)[:3], "disk")
    bundle = store.export(state_id)
    other = World(tmp_path / "b").open()
    before = other.top()
    for i in range(100):
        damaged = bytearray(bundle)
        damaged[len(bundle) * i // 100] ^= 1 << i % 8
        with pytest.raises(StateBundleError):
            other.import_(bytes(damaged))
        with pytest.raises(StateBundleError):
            other.import_(bundle[: len(bundle) * i // 100])
    assert other.top() == before and not other.plane.catalog.entries
    new = other.import_(bundle)
    other.settle()
    assert other.get(new) == store.get(state_id) and new.receipt.reason == "text and 3 blocks"
    assert other.match(TOKENS).num_tokens == 12 and loaded(other, blocks_for(other, TOKENS)[:3]) == 3
    foreign = other.import_(bundle, {"namespace": "b"})
    assert "0 of 3 blocks" in foreign.receipt.reason
    store.close()
    other.close()


def test_explain_survives_many_actions_and_forgets_the_oldest() -> None:
    store = World(None).open()
    state_id = store.put("text")
    for _ in range(100):
        store.get(state_id)
    story = store.explain(state_id)
    assert len(story.receipts) == 64 and story.forgotten == 37 and story.facts["payload_in"] == ["host"]


def test_every_kind_answers_every_question() -> None:
    assert tuple(KIND_TABLE) == KINDS and [row[0] for row in table_rows()] == list(COLUMNS)
    assert all(all(cell for cell in row) for row in table_rows())


def test_what_somebody_puts_as_meta_survives(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    store = world.open()
    store.put('{"per_new_ms": 0.5}', {"kind": "meta", "name": "mine"})
    store.close()
    store = world.open()
    assert store.get("mine", namespace="default") == '{"per_new_ms": 0.5}'
    store.close()


@needs_server
def test_two_planes_share_a_remote_tier(tmp_path: Path) -> None:
    with running_server(tmp_path) as (url, server):
        one, two = (World(None).open(more_tiers=[RemoteTier(url, timeout_s=0.5)]) for _ in range(2))
        blocks = blocks_for(one, TOKENS)
        assert spill(one, blocks, "remote") and two.match(TOKENS).num_tokens == 0
        two.lookup(blocks)
        assert two.match(TOKENS).tiers == ("remote",) * 4 and loaded(two, blocks) == 4
        server.kill()
        server.wait()
        assert loaded(two, blocks) == 0 and two.top()["tiers"]["remote"]["failures"] == 1
        for _ in range(5):
            two.lookup(blocks_for(two, [9] * 4))
        assert two.plane.places["remote"].reads.state == "open"
        assert two.get(two.put("serving goes on")) == "serving goes on"
        one.close()
        two.close()


def test_a_plane_without_any_tier_says_so() -> None:
    store = StateStore([])
    with pytest.raises(StateRefusedError, match="no tier"):
        store.put("text")
    assert not store.evict().ok and store.match([1]).num_tokens == 0 and store.top()["tiers"] == {}


def test_a_folder_opened_read_only_is_read_and_nothing_else(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "state", host_bytes=0) as store:
        state_id = store.put("text")
    before = sorted((file.name, file.stat().st_size) for file in (tmp_path / "state" / "texts").iterdir())
    with StateStore.open(tmp_path / "state", host_bytes=0, read_only=True) as store:
        assert store.get(state_id) == "text" and store.verify().ok
        with pytest.raises(StateRefusedError, match="host has 0 bytes left"):
            store.put("more", {"durable": False})
        with pytest.raises(StateRefusedError, match=r"open read-only\."):
            store.put("more")
        assert not store.drop(state_id).ok
    assert before == sorted((file.name, file.stat().st_size) for file in (tmp_path / "state" / "texts").iterdir())


def test_what_an_older_generation_alone_owned_goes_with_it(tmp_path: Path) -> None:
    """Two turns that share no prefix: nothing of the first one's KV outlives it, in any tier."""
    with StateStore([HostTier(1 << 18), DiskTier(tmp_path, 2 << 20)], settings=SETTINGS, model="m") as store:
        first, second = list(range(40)), list(range(100, 140))
        state_id = store.put(Session([{"role": "user", "content": "x"}], first), {"name": "talk"})
        for tier in ("host", "disk"):
            spill(store, blocks_for(store, first), tier)
        store.settle()
        store.update(state_id, Session([{"role": "user", "content": "y"}], second))
        store.settle()
        assert store.match(first).num_tokens == 0
        store.drop(state_id)
        assert not store.plane.catalog.entries
