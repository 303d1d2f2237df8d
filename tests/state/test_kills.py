"""S1 and S2: processes killed with SIGKILL at random and at named points; what they were told is held in the parent."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nanovllm.state.objects import Session
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.folder import Folder
from tests.state.folders import KILL_POINTS
from tests.state.kill_child import open_store
from tests.state.stores import blocks_for, check_books, loaded

LONG = (pytest.mark.long, pytest.mark.timeout(1800))

ROOT = Path(__file__).resolve().parents[2]
REOPEN_S = 2.0
FEW_POINTS = (
    "texts.write:half",
    "texts.sync:1",
    "texts.rename:1",
    "texts.sync_names:1",
    "texts.remove:0",
    "ledger.commit:0",
    "kv.write:half",
)


@dataclass
class Oracle:
    """What a killed process had been promised: texts by id, and what was under way."""

    acked: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    kv: list[list[int]] = field(default_factory=list)
    under_way: dict[str, object] = field(default_factory=dict)
    finished: bool = False
    slowest_s: float = 0.0  # start, processor seconds

    def hear(self, line: str) -> None:
        record = json.loads(line)
        if "intend" in record:
            self.under_way = record
        elif "acked" in record:
            self.under_way = {}
            if record["acked"] == "drop":
                self.acked.pop(record["id"], None)
                self.dropped.add(record["id"])
            else:
                self.acked[record["id"]] = record["text"]
        elif "kv" in record:
            self.kv.append(record["kv"])
        self.finished = self.finished or "finished" in record


def run_and_kill(folder: Path, oracle: Oracle, seed: int, point: str, hits: int, after_s: float | None) -> int:
    """Run the child until it dies; how it ended."""
    command = [sys.executable, "-m", "tests.state.kill_child", str(folder), str(seed), point, str(hits)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        deadline = None
        for line in child.stdout:
            if line.endswith("\n"):  # a torn last line was never said
                oracle.hear(line)
            if deadline is None and after_s is not None:
                deadline = time.monotonic() + after_s  # from `ready` on
            if deadline is not None and time.monotonic() >= deadline:
                child.kill()
        return child.wait(timeout=60)


def check(folder: Path, oracle: Oracle) -> None:
    """After the kill: what was acknowledged is there and equal, what was dropped is not, nothing else is wrong."""
    started = time.process_time()  # the machine may be busy with others
    store = open_store(folder, Folder)
    oracle.slowest_s = max(oracle.slowest_s, time.process_time() - started)
    assert oracle.slowest_s < REOPEN_S
    store.settle()
    try:
        here = {obj.state_id: store.get(obj.state_id) for obj in store.ls(kind="session")}
        texts = {}
        for state_id, session in here.items():
            assert isinstance(session, Session)
            texts[state_id] = session.messages[0]["content"]
        under_way = oracle.under_way
        for state_id, text in oracle.acked.items():
            allowed = {text}
            if under_way.get("id") == state_id:
                allowed |= {under_way.get("text")} if under_way["intend"] == "update" else {None}
            assert texts.get(state_id) in allowed, f"{state_id} was acknowledged"
        strangers = set(texts) - set(oracle.acked)
        assert not strangers & oracle.dropped, "what was dropped came back"
        allowed_new = {under_way.get("text")} if under_way.get("intend") == "put" else set()
        assert {texts[state_id] for state_id in strangers} <= allowed_new
        for tokens in oracle.kv[-20:]:
            loaded(store, blocks_for(store, tokens))  # right, or a miss
        check_books(store)
        disk = store.plane.places["disk"].tier
        assert isinstance(disk, DiskTier)
        files = [file for sub in ("kv", "texts") for file in (folder / sub).iterdir()]
        assert not [file for file in files if file.suffix == ".new"]
        assert sum(file.stat().st_size for file in files) == disk.file_bytes
        known = {entry.key.hex() for entry in store.plane.catalog.entries.values()}
        assert {file.name for file in files if not file.suffix} <= known, "a file that nobody owns"
        oracle.acked = texts  # what was under way has been decided
        oracle.under_way = {}
    finally:
        store.close()


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=LONG)])
def test_random_kills_lose_nothing_that_was_acknowledged(tmp_path: Path, kills: int) -> None:
    rng, oracle = random.Random(kills), Oracle()
    killed = 0
    for seed in range(kills):
        code = run_and_kill(tmp_path / "state", oracle, seed, "random", 0, rng.uniform(0, 0.4))
        killed += code == -signal.SIGKILL
        check(tmp_path / "state", oracle)
    slowest = f"slowest start {oracle.slowest_s:.2f} processor seconds"
    print(f"\n{killed} of {kills} runs killed; {len(oracle.acked)} objects acknowledged and there; {slowest}")
    assert killed >= kills * 0.8


@pytest.mark.parametrize("each", [1, pytest.param(25, marks=LONG)])
def test_kills_at_named_points_lose_nothing_that_was_acknowledged(tmp_path: Path, each: int) -> None:
    rng, counts = random.Random(each), Counter()
    points = KILL_POINTS if each > 1 else FEW_POINTS
    for number, point in enumerate(points):
        oracle = Oracle()
        for i in range(each):
            hits = rng.randint(1, 3 if point.startswith(("kv.create", "kv.remove")) else 12)
            code = run_and_kill(tmp_path / point, oracle, number * 1000 + i, point, hits, None)
            counts[point] += code == -signal.SIGKILL
            check(tmp_path / point, oracle)
    print("\nkills by point:", dict(counts))
    assert len(counts) == len(points) and all(counts[point] >= each * 0.9 for point in points)
