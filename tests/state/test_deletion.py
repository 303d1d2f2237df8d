"""Deletions: on a full disk, behind damage, in the ledger's own files; told as done only when they are done."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nanovllm.core.clock import VirtualClock
from nanovllm.errors import StateNotFoundError, TierError, TierFullError
from nanovllm.state.breaker import SECOND
from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.disk import QUARANTINE_S
from nanovllm.state.tiers.ledger import Ledger, Row
from tests.state.fake_device import kv_bytes
from tests.state.stores import World, blocks_for, check_books, spill

TEXT = "the vault of the town hall opens at noon"


def talk() -> Session:
    return Session([{"role": "user", "content": TEXT}], [1, 2, 3, 4])


def bytes_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def damage(folder: Path) -> None:
    (text,) = (folder / "texts").iterdir()
    text.write_bytes(text.read_bytes()[:-3] + b"\xff\0\xff")


@pytest.mark.parametrize("failures", [1, 2])
def test_without_room_for_the_ledger_the_text_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    world = World(tmp_path / "state", host_bytes=0)
    store = world.open()
    kept = store.put(talk(), {"kind": "session", "name": "vault"})
    commit, left = Ledger.commit, [failures]

    def full(self: Ledger, *args: object, **named: object) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise TierFullError("The ledger: database or disk is full.")
        commit(self, *args, **named)

    monkeypatch.setattr(Ledger, "commit", full)
    receipt = store.drop(kept)
    assert receipt.ok == (failures == 1) and receipt.detail.get("is_full", False) == (failures == 2)
    assert TEXT.encode() not in bytes_of(tmp_path)  # as a kill -9 would leave it
    check_books(store)
    assert isinstance(world.clock, VirtualClock)
    world.clock.advance(31 * SECOND)
    store.tick()  # what was owed is tried again
    assert not store.plane.debts.by_tier["disk"] and b"vault" not in bytes_of(tmp_path)
    store.close()
    with world.open() as again:
        assert not again.ls() and not again.warnings


@pytest.mark.parametrize("called", ["id", "name"])
def test_a_second_drop_tries_what_the_first_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    with World(tmp_path / "state", host_bytes=0).open() as store:
        kept = store.put(talk(), {"kind": "session", "name": "vault", "namespace": "a"})
        disk = store.plane.places["disk"].tier

        def fail(keys: object, *, scrub: bool = False) -> None:
            raise TierError("The disk is broken.")

        monkeypatch.setattr(disk, "drop", fail)
        name = str(kept) if called == "id" else "vault"
        receipts = []
        for _ in range(4):
            receipts.append(store.drop(name, namespace="a"))
            assert not receipts[-1].ok
            with pytest.raises(StateNotFoundError):
                store.get(name, namespace="a")
        (left,) = store.leaving(name)
        assert len(store.plane.debts.keys_of(left)) == receipts[0].detail["keys"]  # a try adds nothing to what is owed
        assert len({receipt.detail["keys"] for receipt in receipts}) == 1
        with pytest.raises(StateNotFoundError):
            store.drop(name, namespace="b")  # another tenant is not told that there was anything
        assert [str(obj.state_id) for obj in store.leaving(name)] == [kept] and not store.leaving(name, "b")
        monkeypatch.undo()
        assert store.drop(name, namespace="a").ok and not store.leaving(name)
        assert b"vault" not in bytes_of(tmp_path)
        with pytest.raises(StateNotFoundError):
            store.drop(name, namespace="a")
        check_books(store)


def test_no_name_of_a_removed_object_stays_in_the_ledger(tmp_path: Path) -> None:
    with World(tmp_path / "state", host_bytes=0).open() as store:
        gone = store.put(talk(), {"kind": "session", "name": "my-divorce-lawyer"})
        store.put(talk(), {"kind": "session", "name": "the-plumber"})
        assert b"my-divorce-lawyer" in bytes_of(tmp_path)
        assert store.drop(gone).ok
        assert b"my-divorce-lawyer" not in bytes_of(tmp_path) and b"the-plumber" in bytes_of(tmp_path)


def test_a_log_that_somebody_reads_is_no_removal_yet(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger._db.execute("PRAGMA busy_timeout=1")
    ledger.commit(put=[Row(b"key", 1, b"label")])
    reader = Ledger(tmp_path, read_only=True)
    reader._db.execute("BEGIN")
    reader.rows()
    ledger.commit(remove=[b"key"])
    with pytest.raises(TierError, match="somebody reads it"):
        ledger.clean()
    reader.close()
    ledger.clean()
    ledger.close()


def damaged(world: World) -> tuple[StateStore, str]:
    store = world.open()
    kept = store.put(talk(), {"kind": "session", "name": "vault"})
    assert world.folder is not None
    damage(world.folder)
    assert not store.verify().ok
    with pytest.raises(StateNotFoundError):
        store.get(kept)
    return store, kept


def test_verify_counts_what_has_a_name_and_no_bytes(tmp_path: Path) -> None:
    store, kept = damaged(World(tmp_path / "state", host_bytes=0))
    receipt = store.verify()
    assert not receipt.ok and receipt.detail["lost"] == 1
    store.drop(kept)
    assert store.verify().ok
    store.close()


def test_a_damaged_text_goes_from_the_quarantine_with_its_object(tmp_path: Path) -> None:
    store, kept = damaged(World(tmp_path / "state", host_bytes=0))
    assert TEXT[:20].encode() in bytes_of(tmp_path / "state" / "quarantine")
    assert store.drop(kept).ok
    assert TEXT[:20].encode() not in bytes_of(tmp_path)
    store.close()


def test_what_was_set_aside_stays_for_a_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "state", host_bytes=0)
    damaged(world)[0].close()  # and after this start nobody knows the object any more
    world.open().close()
    assert TEXT[:20].encode() in bytes_of(tmp_path / "state" / "quarantine")
    later = time.time() + QUARANTINE_S + 60
    monkeypatch.setattr(time, "time", lambda: later)
    world.open().close()
    assert TEXT[:20].encode() not in bytes_of(tmp_path)


def trimmed(store: StateStore, **options: bool) -> tuple[str, list[int], object]:
    """A session whose second half was deleted, with KV on the disk; its id, its first tokens, the receipt."""
    tokens = list(range(40))
    kept = store.put(Session([{"role": "user", "content": TEXT}], tokens), {"kind": "session", "name": "talk"})
    assert spill(store, blocks_for(store, tokens), "disk")
    store.settle()
    rest = Session([{"role": "user", "content": "short"}], tokens[:8])
    return str(kept), tokens, store.update(kept, rest, **options)


def test_what_is_erased_is_gone_when_it_is_said(tmp_path: Path) -> None:
    store = World(tmp_path / "state", host_bytes=0).open()
    _, tokens, receipt = trimmed(store, erase=True)
    lying = bytes_of(tmp_path)  # as a kill -9 would leave it
    blocks = blocks_for(store, tokens)
    assert receipt.ok and TEXT.encode() not in lying
    assert [kv_bytes(block.digest, 240) in lying for block in blocks] == [True] * 2 + [False] * 8
    store.close()


@pytest.mark.parametrize("erase", [True, False])
def test_what_a_tier_did_not_erase_is_told_and_goes_with_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, erase: bool
) -> None:
    store = World(tmp_path / "state", host_bytes=0).open()
    disk = store.plane.places["disk"].tier

    def fail(keys: object, *, scrub: bool = False) -> None:
        raise TierError("The disk is broken.")

    monkeypatch.setattr(disk, "drop", fail)
    kept, tokens, receipt = trimmed(store, erase=erase)
    assert receipt.ok != erase and store.find(kept).generation == 2
    assert bool(store.leaving(kept)) == erase
    monkeypatch.undo()
    if erase:
        assert store.drop(kept).ok and not store.leaving(kept)
        assert not [b for b in blocks_for(store, tokens) if kv_bytes(b.digest, 240) in bytes_of(tmp_path)]
        assert TEXT.encode() not in bytes_of(tmp_path)
    check_books(store)
    store.close()


def test_a_start_removes_what_a_killed_process_had_not_erased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "state", host_bytes=0)
    store = world.open()
    monkeypatch.setattr(store.plane.places["disk"].tier, "drop", lambda keys, *, scrub=False: None)
    _, tokens, _ = trimmed(store)  # killed behind the commit of the new generation
    store.close()
    store = world.open()
    store.settle()
    lying = bytes_of(tmp_path)
    assert TEXT.encode() not in lying
    assert [kv_bytes(b.digest, 240) in lying for b in blocks_for(store, tokens)] == [True] * 2 + [False] * 8
    check_books(store)
    store.close()
