"""Storage faults: flips, foreign bytes, failing, full and hanging disks, a failing recovery. Never a wrong byte."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm.core.clock import MonotonicClock
from nanovllm.errors import NanoVLLMError, StateFolderError, StateNotFoundError, StateRefusedError
from nanovllm.state import place
from nanovllm.state.breaker import SECOND
from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.folder import Folder
from nanovllm.state.tiers.remote import RemoteTier
from nanovllm.state.tiers.segments import FRAME_BYTES, segment_name
from tests.state.folders import failing
from tests.state.servers import needs_server, running_server
from tests.state.stores import SETTINGS, World, blocks_for, check_books, label_of, loaded, spill

LONG = (pytest.mark.long, pytest.mark.timeout(1800))

ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EROFS, 0)  # 0: half of it, then an error
PROMPTS = [[i] * 4 + list(range(12)) for i in range(12)]


def talk(text: str) -> Session:
    return Session([{"role": "user", "content": text}], [1, 2, 3, 4])


def populated(world: World) -> dict[str, Session]:
    """A closed folder with sessions and KV; what was acknowledged."""
    store = world.open()
    model = {str(store.put(talk(f"text {i} " * 20), {"name": f"s{i}"})): talk(f"text {i} " * 20) for i in range(12)}
    for prompt in PROMPTS:
        spill(store, blocks_for(store, prompt), "disk")
    store.close()
    return model


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.ENOSPC, "make room"), (errno.EROFS, "can be written"), (errno.EIO, "can be written")]
)
def test_a_refused_put_says_what_can_be_done(tmp_path: Path, code: int, hint: str) -> None:
    fails = failing(lambda role, action: code if (role, action) == ("texts", "create") else None)
    with World(tmp_path / "state", folder_class=fails).open() as store:
        with pytest.raises(StateRefusedError, match=os.strerror(code)) as caught:
            store.put("text", {"durable": True})
        assert hint in str(caught.value.hint)
    with World(None, host_bytes=1 << 12).open() as store, pytest.raises(StateRefusedError) as caught:
        store.put("x" * 3_000)
    assert caught.value.hint


def read_all(store: StateStore, model: dict[str, Session]) -> set[str]:
    """The objects that can be read, each equal to what was put; KV is right or missed."""
    good = set()
    for state_id, session in model.items():
        try:
            assert store.get(state_id) == session
            good.add(state_id)
        except StateNotFoundError:
            continue
    for prompt in PROMPTS:
        loaded(store, blocks_for(store, prompt))
    store.settle()
    check_books(store)
    return good


@pytest.mark.parametrize("flips", [100, pytest.param(10_000, marks=LONG)])
def test_flipped_bits_are_never_read(tmp_path: Path, flips: int) -> None:
    """S4 through the whole plane, the catalog's database included."""
    world = World(tmp_path / "state", host_bytes=0)
    model = populated(world)
    home = tmp_path / "state"
    files = sorted(f for f in home.rglob("*") if f.is_file() and f.stat().st_size and f.name not in ("LOCK", "SCHEMA"))
    rng, corrupt, per_round = random.Random(flips), 0, 10
    for _ in range(flips // per_round):
        copy = tmp_path / "copy"
        shutil.copytree(home, copy)
        hit = set()
        for _ in range(per_round):
            file = copy / rng.choice(files).relative_to(home)
            data = bytearray(file.read_bytes())
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            hit.add(file.name)
        store = replace(world, folder=copy).open()
        untouched = {state_id for state_id in model if not any(name.startswith(state_id) for name in hit)}
        known = set(store.plane.catalog.objects)
        good = read_all(store, model)
        assert untouched <= good, "a flip elsewhere, in the catalog for one, loses no text"
        place = store.plane.places["disk"]
        told = place.tally.kinds["session"].corrupt + place.tier.files.counts.damaged
        assert len(model) - len(good) <= told, "lost, and nobody is told"
        assert set(model) <= known or any("Texts were lost" in warning for warning in store.warnings)
        corrupt += place.counters.corrupt + place.tier.files.counts.damaged
        store.close()
        shutil.rmtree(copy)
    print(f"\n{flips} flips, {corrupt} envelopes refused")
    assert corrupt > 0


def test_valid_bytes_in_the_wrong_place_are_never_read(tmp_path: Path) -> None:
    """S5 and attack 35: swapped files, swapped frames, an old version put back, another tenant's file renamed."""
    world = World(tmp_path / "state", host_bytes=0)
    store = world.open()
    one, two = store.put(talk("one")), store.put(talk("two"))
    theirs = store.put(talk("theirs"), {"namespace": "b"})
    grown = store.put(talk("turn 1"))
    texts = tmp_path / "state" / "texts"
    name = {state_id: label_of(store, state_id).key.hex() for state_id in (one, two, theirs, grown)}
    old = (texts / name[grown]).read_bytes()
    store.update(grown, talk("turn 2"))
    newer = label_of(store, grown).key.hex()
    blocks = blocks_for(store, PROMPTS[0])
    spill(store, blocks, "disk")
    places = dict(store.plane.places["disk"].tier.segments._places)
    store.close()
    first, second = (texts / name[one]).read_bytes(), (texts / name[two]).read_bytes()
    (texts / name[one]).write_bytes(second)
    (texts / name[two]).write_bytes((texts / name[theirs]).read_bytes())
    (texts / newer).write_bytes(old)
    segment = tmp_path / "state" / "kv" / segment_name(1)
    data = bytearray(segment.read_bytes())
    a, b = places[blocks[0].digest], places[blocks[2].digest]
    length = min(a.length, b.length)
    span = [slice(place.offset + FRAME_BYTES, place.offset + FRAME_BYTES + length) for place in (a, b)]
    data[span[0]], data[span[1]] = data[span[1]], data[span[0]]
    segment.write_bytes(data)
    store = world.open()
    assert not read_all(store, {one: talk("one"), two: talk("two"), grown: talk("turn 2")})
    assert store.get(theirs) == talk("theirs") and first != second
    reasons = store.top()["tiers"]["disk"]["corrupt_by_reason"]
    assert reasons.get("key", 0) >= 3, reasons
    assert len(list((tmp_path / "state" / "quarantine").iterdir())) >= 3
    assert not store.explain(one).receipts[-1].ok and store.explain(one).facts["payload_in"] == []
    store.close()


def test_a_planted_file_is_data_and_never_code(tmp_path: Path) -> None:
    """Attack 2: bytes that would run if anybody unpickled them."""
    world = World(tmp_path / "state", host_bytes=0)
    model = populated(world)
    marker = tmp_path / "owned"
    payload = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for file in [*(tmp_path / "state" / "texts").iterdir(), *(tmp_path / "state" / "kv").iterdir()]:
        file.write_bytes(payload)
    store = world.open()
    assert not read_all(store, model) and not marker.exists()
    store.close()


@pytest.mark.parametrize("operations", [250, pytest.param(5_000, marks=LONG)])
def test_failing_calls_cost_time_and_never_a_text(tmp_path: Path, operations: int) -> None:
    """S6: one call in twenty fails. What was acknowledged is there when the disk works again."""
    rng, failures = random.Random(operations), [0.05]

    def fails(role: str, action: str) -> int | None:
        return rng.choice(ERRORS) if failures[0] and rng.random() < failures[0] else None

    failures[0] = 0
    world = World(tmp_path / "state", host_bytes=1 << 16, folder_class=failing(fails))
    store, model, dropped = world.open(), {}, set()
    failures[0] = 0.05
    refused = 0
    for i in range(operations):
        world.clock.advance(SECOND // 10)
        try:
            choice = rng.random()
            if choice < 0.3:
                state_id = store.put(talk(f"{i}"))
                model[state_id] = talk(f"{i}")
            elif choice < 0.4 and model:
                state_id = rng.choice(list(model))
                model[state_id], before = talk(f"{i} again"), model[state_id]
                try:
                    store.update(state_id, model[state_id])
                except StateRefusedError:
                    model[state_id] = before
                    raise
            elif choice < 0.45 and model:
                state_id = rng.choice(list(model))
                model.pop(state_id)
                dropped.add(state_id)
                store.drop(state_id)
            elif choice < 0.7:
                spill(store, blocks_for(store, [rng.randrange(100) for _ in range(16)]), "disk")
            else:
                loaded(store, blocks_for(store, PROMPTS[i % 12]))
        except StateRefusedError:
            refused += 1
        store.tick()
    assert 0 < refused < operations / 2
    assert store.plane.places["disk"].writes.num_opened > 0
    failures[0] = 0.0
    world.clock.advance(31 * SECOND)
    for _ in range(3):
        store.tick()
    store.close()
    store = replace(world, folder_class=Folder).open()
    kept = {state_id for state_id in model if state_id in store.plane.catalog.objects}
    assert kept == set(model), "what was acknowledged is there"
    assert read_all(store, model) == set(model) and not dropped & set(store.plane.catalog.objects)
    store.close()


@pytest.mark.parametrize("role", ["kv", "texts"])
def test_a_full_disk_stops_spilling_and_not_serving(tmp_path: Path, role: str) -> None:
    """S8: ENOSPC opens the breaker for writes at once; reads go on; when there is room again, so does writing."""
    full = [False]
    fails = failing(lambda where, action: errno.ENOSPC if full[0] and where == role and action == "write" else None)
    world = World(tmp_path / "state", host_bytes=0, folder_class=fails)
    store = world.open()
    blocks = blocks_for(store, PROMPTS[0])
    assert spill(store, blocks, "disk")
    full[0] = True
    if role == "kv":
        assert not spill(store, blocks_for(store, PROMPTS[1]), "disk")
    else:
        with pytest.raises(StateRefusedError, match="No space left on device"):
            store.put(talk("no room"))
    assert store.plane.places["disk"].writes.state == "open" and store.plane.places["disk"].writes.reason == "full"
    assert not spill(store, blocks_for(store, PROMPTS[2]), "disk"), "left alone, at no cost"
    assert store.top()["tiers"]["disk"]["refused"] > 0
    assert loaded(store, blocks) == 4 and store.match(PROMPTS[0]).num_tokens == 16
    full[0] = False
    assert store.get(store.put(talk("a text insists"))) == talk("a text insists")
    assert spill(store, blocks_for(store, PROMPTS[3]), "disk")
    store.close()


def test_a_hanging_tier_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S7: reads that never return end at their deadline, leave no thread but their own, and tell of its speed."""
    gate, hang = threading.Event(), [False]
    monkeypatch.setattr(place, "MIN_MEASURED", 1)

    class Hanging(Folder):
        def read(self, fd: int, length: int, offset: int) -> bytes:
            if hang[0]:
                gate.wait(30)
            return super().read(fd, length, offset)

    world = World(tmp_path / "state", host_bytes=0, folder_class=Hanging)
    quick = replace(SETTINGS, read_deadline_ms=50.0)
    store = world.open(threads=True, clock=MonotonicClock(), settings=quick)
    blocks = blocks_for(store, PROMPTS[0])
    spill(store, blocks, "disk")
    before = threading.active_count()
    hang[0] = True
    assert loaded(store, blocks) == 0, "computed again"
    for _ in range(5):
        assert loaded(store, blocks) == 0
    disk = store.plane.places["disk"]
    assert disk.reads.state == "open" and threading.active_count() == before
    size = sum(store.plane.catalog.entries[block.digest].size_bytes for block in blocks)
    assert disk.read_speed.ms(size) > 10, "of the 50 ms that each of them was waited for"
    assert store.put(talk("writing is not reading"))
    hang[0] = False
    gate.set()
    while store.plane.mover.late_reports < 5:
        store.poll()
    check_books(store)
    store.close()


@pytest.mark.parametrize("rounds", [12, pytest.param(100, marks=LONG)])
def test_a_failing_recovery_ends_in_a_warning_and_loses_nothing(tmp_path: Path, rounds: int) -> None:
    """S12: one call in ten fails while the folder is opened; the next sound start has everything."""
    world = World(tmp_path / "state", host_bytes=0)
    model = populated(world)
    rng, degraded = random.Random(rounds), 0
    for _ in range(rounds):
        fails = failing(lambda role, action: errno.EIO if rng.random() < 0.1 else None)
        try:
            store = replace(world, folder_class=fails).open()
        except StateFolderError as error:
            assert "cannot be opened" in error.message
            degraded += 1
            continue
        degraded += bool(store.warnings)
        for state_id, session in model.items():
            try:
                assert store.get(state_id) == session
            except NanoVLLMError as error:
                assert error.status == 404
        store.close()
    store = world.open()
    assert read_all(store, model) == set(model)
    store.close()


@needs_server
def test_a_paused_server_is_left_alone(tmp_path: Path) -> None:
    """S11: SIGSTOP. Reads end at the socket's timeout, then the breaker spares everybody the wait."""
    with running_server(tmp_path) as (url, server):
        store = World(None).open(more_tiers=[RemoteTier(url, timeout_s=0.1)])
        place = store.plane.places["remote"]
        blocks = blocks_for(store, PROMPTS[0])
        assert spill(store, blocks, "remote") and loaded(store, blocks) == 4
        os.kill(server.pid, signal.SIGSTOP)
        for _ in range(5):
            assert loaded(store, blocks) == 0
        assert place.reads.state == "open"
        failures = place.counters.failures
        assert loaded(store, blocks) == 0 and place.counters.failures == failures, "not even tried"
        os.kill(server.pid, signal.SIGCONT)
        store.plane.clock.advance(30 * SECOND)
        assert loaded(store, blocks) == 4 and place.reads.state == "closed"
        store.close()
