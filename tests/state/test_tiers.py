"""Each tier against a dictionary; the disk tier against damage, foreign files, power loss and a second owner."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm.core.clock import VirtualClock
from nanovllm.errors import StateFolderError, TierError, TierFullError
from nanovllm.state.breaker import SECOND, CircuitBreaker
from nanovllm.state.envelope import BadEnvelope, Label, seal, unseal
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.host import HostTier
from nanovllm.state.tiers.remote import RemoteTier
from nanovllm.state.tiers.segments import ALIGNMENT, segment_name
from nanovllm.state.tiers.tier import Item, Tier
from tests.state.folders import PowerLoss
from tests.state.servers import needs_server, running_server

LONG = (pytest.mark.long, pytest.mark.timeout(1800))

MIB = 1 << 20
KEYS = [bytes([i]) * 32 for i in range(8)]


def item(key: bytes, payload: bytes, *, durable: bool = False) -> Item:
    return Item(key, seal(Label(key=key, kind="kv", namespace="n"), payload), durable)


def payload_of(tier: Tier, key: bytes) -> bytes | None:
    """What a verified read gives: the payload, or a miss."""
    sealed = tier.read([key])[0]
    try:
        return None if sealed is None else unseal(sealed, Label(key=key, kind="kv", namespace="n"))
    except BadEnvelope:
        return None


class TierMachine(RuleBasedStateMachine):
    """Writes, drops and (for the disk) restarts, held against a dictionary."""

    make: staticmethod
    restarts = False

    @initialize()
    def begin(self) -> None:
        self.tier, self.model = self.make(), {}

    @rule(key=st.sampled_from(KEYS), size=st.integers(0, 9000), durable=st.booleans(), seed=st.integers(0, 2**32))
    def write(self, key: bytes, size: int, durable: bool, seed: int) -> None:
        if key in self.model:
            self.tier.drop([key])
        payload = random.Random(seed).randbytes(size)
        self.tier.write([item(key, payload, durable=durable and self.tier.durable)])
        self.model[key] = payload

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4), scrub=st.booleans())
    def drop(self, keys: list[bytes], scrub: bool) -> None:
        self.tier.drop(keys, scrub=scrub)
        for key in keys:
            self.model.pop(key, None)

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True))
    def read(self, keys: list[bytes]) -> None:
        assert [payload_of(self.tier, key) for key in keys] == [self.model.get(key) for key in keys]
        assert self.tier.contains(keys) == [key in self.model for key in keys]

    @precondition(lambda self: self.restarts)
    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = self.make()
        assert {found.label.key for found in self.tier.scan()} == set(self.model)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "model") and self.tier.quota_bytes is not None:
            sizes = sum(len(self.tier.read([key])[0] or b"") for key in self.model)
            assert sizes <= self.tier.used_bytes <= sizes + len(self.model) * 2 * ALIGNMENT

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()


def run_machine(make: object, examples: int, *, restarts: bool = False) -> None:
    machine = type("Machine", (TierMachine,), {"make": staticmethod(make), "restarts": restarts})
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, deadline=None, suppress_health_check=slow)
    )


def test_host_is_a_dictionary() -> None:
    run_machine(lambda: HostTier(MIB), 15)


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=LONG)])
def test_disk_is_a_dictionary_that_survives_restarts(tmp_path: Path, examples: int) -> None:
    def make_in(folder: list[Path]) -> DiskTier:
        return DiskTier(folder[0], 4 * MIB)

    class Fresh(TierMachine):
        restarts = True

        @initialize()
        def begin(self) -> None:
            self.folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "state"
            self.make = lambda: make_in([self.folder])  # type: ignore[method-assign]
            super().begin()
            assert list(self.tier.scan()) == []

        def teardown(self) -> None:
            if hasattr(self, "tier"):
                assert du(self.folder) == self.tier.file_bytes
            super().teardown()

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Fresh,
        settings=settings(max_examples=examples, deadline=None, suppress_health_check=slow, stateful_step_count=25),
    )


@needs_server
def test_remote_is_a_dictionary_whatever_the_part_size(tmp_path: Path) -> None:
    with running_server(tmp_path) as (url, _):

        def make() -> RemoteTier:
            tier = RemoteTier(url, part_bytes=1000, mac_key=b"secret")
            tier.drop(KEYS)
            return tier

        run_machine(make, 10)


def du(folder: Path) -> int:
    return sum(file.stat().st_size for sub in ("kv", "texts") for file in (folder / sub).iterdir())


def filled(folder: Path, count: int = 40, size: int = 3000) -> dict[bytes, bytes]:
    """A closed folder with `count` frames; every fourth is a durable file."""
    rng, model = random.Random(1), {}
    tier = DiskTier(folder, 16 * MIB)
    list(tier.scan())
    for i in range(count):
        key = i.to_bytes(32, "big")
        model[key] = rng.randbytes(size)
        tier.write([item(key, model[key], durable=i % 4 == 0)])
    tier.close()
    return model


def survivors(folder: Path, model: dict[bytes, bytes]) -> set[bytes]:
    """The keys that can still be read; whatever is read must be right."""
    tier = DiskTier(folder, 16 * MIB)
    try:
        list(tier.scan())
        found = {key: payload_of(tier, key) for key in model}
    finally:
        tier.close()
    assert all(payload in (None, model[key]) for key, payload in found.items())
    return {key for key, payload in found.items() if payload is not None}


@pytest.mark.parametrize("rounds", [24, pytest.param(1000, marks=LONG)])
def test_torn_writes_are_misses(tmp_path: Path, rounds: int) -> None:
    """S3: a truncated file, a zeroed page, a doubled tail. Only what was hit is lost."""
    model = filled(tmp_path / "state")
    rng = random.Random(rounds)
    for i in range(rounds):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(tmp_path / "state", copy)
        file = copy / "kv" / segment_name(1)
        data = file.read_bytes()
        damage = ("truncate", "zero", "double")[i % 3]
        if damage == "truncate":
            file.write_bytes(data[: rng.randrange(0, len(data), ALIGNMENT)])
        elif damage == "zero":
            at = rng.randrange(0, len(data), 4096)
            file.write_bytes(data[:at] + bytes(min(4096, len(data) - at)) + data[at + 4096 :])
        else:
            file.write_bytes(data + data[-rng.randrange(1, 9000) :])
        kept = survivors(copy, model)
        assert {key for key in model if int.from_bytes(key, "big") % 4 == 0} <= kept  # durable ones were not touched
        assert damage == "truncate" or len(kept) >= len(model) - 3
        shutil.rmtree(copy)


@pytest.mark.parametrize("flips", [120, pytest.param(10_000, marks=LONG)])
def test_bit_flips_are_misses(tmp_path: Path, flips: int) -> None:
    """S4 in the disk tier's own read path: segments, durable files and the ledger with its write-ahead log."""
    model = filled(tmp_path / "state", count=16, size=700)
    files = sorted(
        file for file in (tmp_path / "state").rglob("*") if file.is_file() and file.name not in ("LOCK", "SCHEMA")
    )
    rng, lost = random.Random(flips), 0
    per_round = 8
    for i in range(flips // per_round):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "state", copy)
        hit = set()
        for _ in range(per_round):
            file = copy / rng.choice(files).relative_to(tmp_path / "state")
            data = bytearray(file.read_bytes())
            bit = rng.randrange(8 * len(data)) if data else 0
            if data:
                data[bit // 8] ^= 1 << bit % 8
                file.write_bytes(data)
                hit.add(file.parent.name if file.parent.name == "kv" else file.name)
        kept = survivors(copy, model)
        durable = {key for key in model if int.from_bytes(key, "big") % 4 == 0}
        untouched = {key for key in durable if key.hex() not in hit}
        assert untouched <= kept, f"round {i}: a flip elsewhere, the ledger included, loses no durable file"
        lost += len(model) - len(kept)
        shutil.rmtree(copy)
    assert lost > 0  # the flips did hit


@pytest.mark.parametrize("examples", [6, pytest.param(1000, marks=LONG)])
@pytest.mark.parametrize("keep_ledger", [True, False])
def test_what_was_acknowledged_survives_a_power_loss(tmp_path: Path, examples: int, keep_ledger: bool) -> None:
    """The disk forgets what was not synced, all of it or some of it; a SIGKILL alone would prove nothing here."""
    for seed in range(examples):
        rng = random.Random(seed)
        power, before, after = PowerLoss(), tmp_path / f"{seed}", tmp_path / f"{seed}-after"
        tier = DiskTier(before, 4 * MIB, folder_class=power.folder_class())
        list(tier.scan())
        durable, volatile, dropped = {}, {}, {}
        for step in range(rng.randint(1, 25)):
            group = []
            for part in range(rng.randint(1, 3)):
                key = (4 * step + part).to_bytes(32, "big")
                payload = rng.randbytes(rng.randint(0, 3000))
                (durable if (is_durable := rng.random() < 0.5) else volatile)[key] = payload
                group.append(item(key, payload, durable=is_durable))
            tier.write(group)
            if rng.random() < 0.3:
                power.write_back(before / "kv")
            for held in (durable, volatile):
                if held and rng.random() < 0.2:
                    gone = rng.choice(list(held))
                    tier.drop([gone], scrub=True)
                    dropped[gone] = held.pop(gone)
        power.strike(before, after, rng if seed % 2 else None, keep_ledger=keep_ledger)
        tier.close()
        again = DiskTier(after, 4 * MIB)
        found = {entry.label.key for entry in again.scan()}
        assert not dropped.keys() & found, "what was dropped came back"
        lying = b"".join(file.read_bytes() for file in (after / "kv").glob("*.seg"))
        assert not [payload for payload in dropped.values() if len(payload) > 8 and payload in lying]
        assert {key: payload_of(again, key) for key in durable} == durable
        assert all(payload_of(again, key) in (None, payload) for key, payload in volatile.items())
        again.close()


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_a_scrubbed_block_does_not_come_back_after_a_power_loss(tmp_path: Path, is_rewritten: bool) -> None:
    """Not its bytes, and not a file that was removed when its frames were copied behind the others."""
    power, secret = PowerLoss(), random.Random(4).randbytes(64)
    tier = DiskTier(tmp_path / "a", 4 * MIB, folder_class=power.folder_class())
    list(tier.scan())
    tier.write([item(KEYS[0], secret), *(item(key, bytes(3000)) for key in KEYS[1:])])
    power.write_back(tmp_path / "a" / "kv")
    if is_rewritten:
        tier.segments._rewrite(1)
    tier.drop([KEYS[0]], scrub=True)
    power.strike(tmp_path / "a", tmp_path / "b", None, keep_ledger=True)
    tier.close()
    assert not [file for file in (tmp_path / "b").rglob("*") if file.is_file() and secret in file.read_bytes()]


def test_the_power_loss_shim_can_tell(tmp_path: Path) -> None:
    """Without the syncs the same test loses data, so it can fail."""
    power = PowerLoss()

    class Lazy(power.folder_class()):  # type: ignore[misc]
        def sync(self, fd: int) -> None:
            pass

    tier = DiskTier(tmp_path / "a", 4 * MIB, folder_class=Lazy)
    list(tier.scan())
    tier.write([item(KEYS[0], b"x" * 100, durable=True)])
    power.strike(tmp_path / "a", tmp_path / "b", None, keep_ledger=True)
    tier.close()
    again = DiskTier(tmp_path / "b", 4 * MIB)
    list(again.scan())
    assert payload_of(again, KEYS[0]) is None
    again.close()


def test_a_scrubbed_payload_is_nowhere_on_the_disk(tmp_path: Path) -> None:
    secret = random.Random(2).randbytes(64)
    tier = DiskTier(tmp_path / "state", 4 * MIB)
    list(tier.scan())
    for i in range(3):  # dropped without scrubbing and written again: older copies lie in the segment, too
        tier.write([item(KEYS[0], secret), item(bytes([99 + i]) * 32, b"y" * 2000)])
        tier.drop([KEYS[0]], scrub=i == 2)
    tier.close()
    assert not [file for file in (tmp_path / "state").rglob("*") if file.is_file() and secret in file.read_bytes()]


def test_thin_segments_are_rewritten_and_the_bound_holds(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "state", 4 * MIB)
    list(tier.scan())
    rng, live = random.Random(3), {}
    for i in range(1500):
        key = i.to_bytes(32, "big")
        new = item(key, rng.randbytes(8000))
        while live and tier.used_bytes + len(new.sealed) + ALIGNMENT > tier.quota_bytes:
            tier.drop([live.pop(rng.choice(list(live)))])
        tier.write([new])
        live[key] = key
        assert tier.file_bytes <= tier.size_bytes
    assert tier.segments.counts.copied_bytes > 0 and tier.segments.counts.removed_segments > 10
    assert du(tmp_path / "state") == tier.file_bytes
    assert all(payload_of(tier, key) is not None for key in live)
    with pytest.raises(TierFullError):
        tier.write([item(b"z" * 32, bytes(2 * MIB)), item(b"y" * 32, bytes(2 * MIB), durable=True)])
    tier.close()


def test_one_owner_per_folder(tmp_path: Path) -> None:
    """S9: a second process is refused with a message; reading only is allowed beside the owner."""
    folder = tmp_path / "state"
    tier = DiskTier(folder, 4 * MIB)
    list(tier.scan())
    tier.write([item(KEYS[0], b"text", durable=True), item(KEYS[1], b"kv")])
    code = "import sys, pathlib, nanovllm.state.tiers.disk as d; d.DiskTier(pathlib.Path(sys.argv[1]), 10**6)"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"in use by process {os.getpid()}" in done.stderr
    reader = DiskTier(folder, 4 * MIB, read_only=True)
    assert (
        len(list(reader.scan())) == 2
        and payload_of(reader, KEYS[1]) == b"kv"
        and payload_of(reader, KEYS[0]) == b"text"
    )
    for refused in (lambda: reader.write([item(KEYS[2], b"")]), lambda: reader.drop([KEYS[0]])):
        with pytest.raises(TierError, match="read-only"):
            refused()
    reader.close()
    tier.close()
    DiskTier(folder, 4 * MIB).close()


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(StateFolderError, match="not empty"):
        DiskTier(tmp_path / "foreign", MIB)
    DiskTier(tmp_path / "newer", MIB).close()
    (tmp_path / "newer" / "SCHEMA").write_text("2\n")
    with pytest.raises(StateFolderError, match="schema '2'; this version reads 1"):
        DiskTier(tmp_path / "newer", MIB)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateFolderError):
        DiskTier(tmp_path / "file", MIB)
    with pytest.raises(StateFolderError, match="no state folder"):
        DiskTier(tmp_path / "nowhere", MIB, read_only=True)


@pytest.mark.parametrize(("name", "text"), [("thesis.tex", "x"), ("SCHEMA", "2\n")])
def test_a_folder_that_is_refused_is_left_as_it_was(tmp_path: Path, name: str, text: str) -> None:
    folder = tmp_path / "docs"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / name).write_text(text)
    facts = lambda: (folder.stat().st_mode, folder.stat().st_mtime_ns, folder.stat().st_ctime_ns)  # noqa: E731
    before = facts()
    with pytest.raises(StateFolderError):
        DiskTier(folder, MIB)
    assert facts() == before
    assert [entry.name for entry in folder.iterdir()] == [name]


def test_strange_entries_in_the_folder_do_no_harm(tmp_path: Path) -> None:
    """Attack 33: a link, a pipe and a directory where files are expected; nothing outside is touched."""
    folder = tmp_path / "state"
    model = filled(folder, count=4)
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    for name, make in (
        ("a" * 64, lambda path: path.symlink_to(outside)),
        ("b" * 64, os.mkfifo),
        ("c" * 64, Path.mkdir),
        ("d" * 64, lambda path: path.write_bytes(b"not ours")),
        ("-weird name", lambda path: path.write_bytes(b"x")),
    ):
        make(folder / "texts" / name)
    (folder / "kv" / segment_name(7)).symlink_to(outside)
    assert survivors(folder, model) == set(model)
    assert outside.read_bytes() == b"precious"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "kv", folder / "texts")}
    assert modes == {0o700}
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.name[0] not in "d-"
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


@needs_server
def test_remote_parts_that_do_not_fit_together_are_misses(tmp_path: Path) -> None:
    """Attacks 2 and 35 at the server: lost, swapped, truncated, foreign and forged values."""
    import redis

    with running_server(tmp_path) as (url, _):
        tier = RemoteTier(url, part_bytes=500, mac_key=b"k1")
        client = redis.Redis.from_url(url)
        name = f"nanovllm:{KEYS[0].hex()}"
        forged = item(KEYS[0], b"forged")

        def attack(change: object) -> None:
            tier.write([item(KEYS[0], bytes(1800)), item(KEYS[1], b"1" * 1800)])
            assert payload_of(tier, KEYS[0]) == bytes(1800)
            change()
            assert payload_of(tier, KEYS[0]) is None

        attack(lambda: client.delete(f"{name}:1"))
        attack(lambda: client.set(f"{name}:1", client.get(f"nanovllm:{KEYS[1].hex()}:1")))
        attack(lambda: client.set(f"{name}:1", b"short"))
        attack(lambda: client.set(name, b"\xff\xff\xff\xff"))
        attack(lambda: client.set(name, b""))
        attack(lambda: client.flushall())
        attack(lambda: (client.set(f"{name}:0", forged.sealed), client.set(name, b"\1\0\0\0")))
        attack(lambda: RemoteTier(url, mac_key=b"another").write([forged]))
        client.delete(name)
        client.lpush(name, "a list")  # a value of another type
        assert payload_of(tier, KEYS[0]) is None
        client.close()
        tier.close()


@needs_server
def test_a_server_without_memory_is_full_and_one_without_a_process_has_failed(tmp_path: Path) -> None:
    with running_server(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as (url, process):
        tier = RemoteTier(url, timeout_s=0.5)
        with pytest.raises(TierFullError):
            for i in range(40):
                tier.write([item(i.to_bytes(32, "big"), bytes(200_000))])
        process.kill()
        process.wait()
        with pytest.raises(TierError, match=r"failed|reached"):
            tier.read([KEYS[0]])
        tier.close()


def test_a_breaker_opens_tries_once_and_closes() -> None:
    clock = VirtualClock()
    breaker = CircuitBreaker(clock)
    for _ in range(5):
        assert breaker.allow()
        breaker.failure("EIO")
    assert breaker.state == "open" and not breaker.allow() and breaker.reason == "EIO"
    clock.advance(30 * SECOND)
    assert breaker.allow() and not breaker.allow()  # one try
    breaker.failure("EIO again")
    assert not breaker.allow()
    clock.advance(30 * SECOND)
    assert breaker.allow()
    breaker.success()
    assert breaker.state == "closed" and breaker.num_opened == 1
    for i in range(20):  # now and then: no row of them
        breaker.failure("EIO")
        if i % 4 == 3:
            breaker.success()
    assert breaker.state == "closed"
    for _ in range(5):  # each caller waits, and they are rare: the row counts, not the time
        assert breaker.allow()
        breaker.failure("deadline")
        clock.advance(60 * SECOND)
    assert breaker.num_opened == 2
