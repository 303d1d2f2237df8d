"""`lab run 4`: equal on every machine where time is virtual; nothing overwritten, failures kept; a real model."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import BundleError, ExecutionError, InvalidRequestError
from nanovllm.lab.bundle import PARTS
from nanovllm.lab.experiment_4 import run as run_module
from nanovllm.lab.experiment_4.cases import CASES, FULL, MIN_REPEATS, QUICK, RUNS, plan
from nanovllm.lab.experiment_4.check import check_bundle
from nanovllm.lab.experiment_4.run import Settings, run_experiment
from nanovllm.lab.experiment_4.tables import COLUMNS
from nanovllm.lab.manifest import read_manifest
from nanovllm.lab.student_observer import Observation
from tests.lab.students import COUNTER, PROBE

VIRTUAL = Settings(model=None, quick=True)
# What the virtual clock gives on any machine, with seed 0: the cells of results.csv, explanations aside, and the chain.
VIRTUAL_CELLS = Path(__file__).with_name("experiment_4_virtual.csv")
CHAIN = {"short_ctx base": 0.0, "long_ctx base": -203.115, "mixed_ctx base": -61.498, "reverse": -168.038}


def read_cells(folder: Path) -> list[list[str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    return [row[:-1] for row in rows[1:]]


def tables_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tables.json").read_text(encoding="utf-8"))


def test_cells_on_the_virtual_clock_are_the_committed_ones(whole_bundle: Path) -> None:
    with VIRTUAL_CELLS.open(encoding="utf-8", newline="") as file:
        assert read_cells(whole_bundle) == list(csv.reader(file))
    chain = tables_of(whole_bundle)["chain"]
    changes = {f"{one['case']} {one['small_pool']['arm']}": one["T_queue"]["change"] for one in chain["interventions"]}
    changes["reverse"] = chain["reverse"]["T_queue"]["change"]
    assert changes == CHAIN and chain["verdict"] == "holds"


def test_a_bundle_has_its_parts_and_its_manifest_the_facts(whole_bundle: Path) -> None:
    assert {path.name for path in whole_bundle.iterdir()} == set(PARTS)
    manifest = read_manifest(whole_bundle)
    assert manifest["status"] == "ok" and manifest["seed"] == 0 and len(manifest["order"]) == 21
    assert {"commit", "dirty", "command", "environment", "order", "pools"} <= set(manifest)
    run = manifest["run"]
    assert (run["policy"], run["block_size"], run["prior_state"], run["label"]) == ("fcfs", 16, "cold", "simulated")
    files = {path.relative_to(whole_bundle).as_posix() for path in whole_bundle.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert all(len(facts["sha256"]) == 64 for facts in manifest["files"].values())
    assert sum(facts["bytes"] for facts in manifest["files"].values()) < 2 * 2**20


def test_the_table_is_of_one_pool_that_is_a_wall_for_long_contexts(whole_bundle: Path) -> None:
    tables = tables_of(whole_bundle)
    base = [run for run in tables["runs"] if run["arm"] == "base"]
    assert {run["num_blocks"] for run in base} == {QUICK.base_blocks} == {tables["total_blocks"]["pool"]}
    waits = Counter({case: sum(run["pool_waits"] for run in base if run["case"] == case) for case in CASES})
    assert waits["short_ctx"] == 0 < waits["mixed_ctx"] and waits["long_ctx"] > 0
    assert [row["case"] for row in tables["capacity_table"]] == list(CASES)
    for row in tables["capacity_table"]:
        assert row["TTFT"]["p50"] >= row["queue_wait"]["p50"]
        assert row["estimated_kv"]["label"] == "estimated" and row["estimated_kv"]["counted_error_blocks"] == 0
        for size in row["estimated_kv"]["per_request"]:
            assert 0 <= size["bound_bytes"] < 16 * 23_040
            assert size["block_exact_bytes"] == size["blocks"] * 16 * 23_040
    assert tables["capacity_table"][2]["prompt_len"]["value"] == [48, 160]


@pytest.mark.parametrize("repeats", [3, 4])
def test_repeats_alternate(repeats: int) -> None:
    runs = plan(repeats)
    assert [run.position for run in runs] == list(range(1, len(RUNS) * repeats + 1))
    by_repeat = [[(run.arm, run.case) for run in runs if run.repeat == k] for k in range(1, repeats + 1)]
    assert all(one == (list(RUNS) if k % 2 == 0 else list(reversed(RUNS))) for k, one in enumerate(by_repeat))
    assert MIN_REPEATS == 3


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_cases_differ_in_their_contexts_alone(size: Any) -> None:
    plans = {case: size.workload(case, 0, 256) for case in CASES}
    lengths = {case: set(one.prompt_lens().values()) for case, one in plans.items()}
    assert lengths == {
        "short_ctx": {size.short_len},
        "long_ctx": {size.long_len},
        "mixed_ctx": {size.short_len, size.long_len},
    }
    assert {r.output_len for one in plans.values() for r in one.requests} == {size.output_len}
    assert size.tight_blocks < size.base_blocks < size.roomy_blocks


def test_a_run_is_never_overwritten(bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with pytest.raises(BundleError, match="never overwritten"):
        run_experiment(bundle, VIRTUAL)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_failed_run_is_kept_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_RAW_BYTES", 4096)
    out = tmp_path / "failed"
    with pytest.raises(ExecutionError, match="events lost"):
        run_experiment(out, VIRTUAL)
    manifest = read_manifest(out)
    assert manifest["status"] == "failed" and "events lost" in manifest["error"]
    assert (out / "raw" / "01-base-short_ctx-1.jsonl").is_file() and "events lost" in (out / "notes.md").read_text()
    assert check_bundle(out).broken() == {"status"}
    with pytest.raises(BundleError, match="never overwritten"):
        run_experiment(out, VIRTUAL)


def test_a_killed_run_cannot_pass_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_record", stop)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(tmp_path / "out", VIRTUAL)
    assert read_manifest(tmp_path / "out")["status"] == "failed"


def test_students_observers_agree_with_the_reference(whole_bundle: Path, tmp_path: Path) -> None:
    """The counter in the fixture's bundle, the probe in one of its own; neither changes a figure."""
    counted = tables_of(whole_bundle)
    assert counted["observer"]["name"] == "Counter" and len(counted["observer"]["reports"]) == 21
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    out = tmp_path / "probed"
    probed = run_experiment(out, VIRTUAL, Observation(f"{tmp_path / 'probe.py'}:Probe"))
    assert check_bundle(out).is_pass
    assert probed["observer"]["reports"]["02-base-long_ctx-1"]["overlap_tokens"] == 7 * 32
    assert {**counted, "observer": None} == {**probed, "observer": None}


@pytest.mark.parametrize(
    ("source", "given", "reason"),
    [
        (COUNTER, "mine.py:Nobody", "no class or function Nobody"),
        (COUNTER, "yours.py:Counter", "There is no observer"),
        (COUNTER, "mine.py", "There is no observer"),
        ("import nothing_like_it", "mine.py:A", "cannot be imported: ModuleNotFoundError"),
        ("def A(:", "mine.py:A", "cannot be imported: SyntaxError"),
    ],
)
def test_observers_that_cannot_be_loaded(tmp_path: Path, source: str, given: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(InvalidRequestError, match=reason):
        Observation(str(tmp_path / given))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "def on_event(self, event):\n  1 / 0\n def report(self): return {}",
            r"mine.py:A, line 3 failed on run: ZeroDiv",
        ),
        ("def on_event(self, event): pass\n def report(self): return 3", "report cannot be used"),
        ("def on_event(self, event): pass\n def report(self): return {'kind': 'gain'}", "report cannot be used"),
        ("def on_event(self, event): pass\n def report(self): return {'kind': self}", "report cannot be used"),
        ("def report(self): return {}", "AttributeError"),
    ],
)
def test_observers_that_fail(tmp_path: Path, body: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(f"class A:\n {body}\n", encoding="utf-8")
    with pytest.raises(InvalidRequestError, match=reason):
        Observation(f"{tmp_path / 'mine.py'}:A").observe("run", [{"record": "header"}])


def test_a_real_engine_leaves_a_bundle_that_passes(tmp_path: Path) -> None:
    """Whether the chain holds on a busy machine is what the run says; every other rule holds."""
    out = tmp_path / "real"
    tables = run_experiment(out, Settings(model="tiny:random", quick=True, num_threads=1))
    assert tables["label"] == "measured" and tables["chain"]["verdict"] in ("holds", "refuted")
    verdict = check_bundle(out)
    assert verdict.is_pass, [finding.text("en") for finding in verdict.findings]
    waits = {run["arm"]: run["pool_waits"] for run in tables["runs"] if run["case"] == "long_ctx"}
    assert waits["base"] > 0 == waits["roomy"]
    assert read_manifest(out)["run"]["model"] == "tiny:random"
