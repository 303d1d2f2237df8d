"""`nanovllm probe`: labels beside every figure, and traces that are none told apart."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.observe.probe import STATEMENT
from tests.observe.test_prefix_trace import ROWS, written

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return written(tmp_path / "trace.jsonl", ROWS)


def test_the_verb_labels_every_figure(nanovllm: Run, trace: Path) -> None:
    done = nanovllm("probe", str(trace), "--capacity", "2", "--block-size", "512", "--block-size", "1024")
    first, *figures = done.stdout.splitlines()
    assert first.startswith("4 requests, 4,412 prompt tokens, 10 blocks of 512 tokens named, 4 of them distinct")
    assert len(figures) == 4 and all(STATEMENT in line and "observe-only" in line for line in figures)
    document = json.loads(nanovllm("probe", str(trace), "--json").stdout)
    assert {figure["statement"] for figure in document["figures"]} == {STATEMENT}
    assert document["figures"][0]["overlap_tokens"] == 4 * 512


@pytest.mark.parametrize(
    ("flags", "word"), [(("--block-size", "700"), "block_size"), (("--hash-block", "256"), "hash_block")]
)
def test_sizes_that_do_not_fit_the_trace_are_refused(
    nanovllm: Run, trace: Path, flags: tuple[str, ...], word: str
) -> None:
    done = nanovllm("probe", str(trace), *flags)
    assert done.returncode == 2 and word in done.stderr


def test_a_recording_of_events_is_told_apart(nanovllm: Run, tmp_path: Path) -> None:
    path = written(tmp_path / "events.jsonl", [{"schema": 1, "seq": 0, "ts_ns": 1, "request_id": "a"}])
    done = nanovllm("probe", str(path))
    assert done.returncode == 2 and "names no blocks" in done.stderr


def test_a_workload_with_the_probe_beside_it(nanovllm: Run) -> None:
    """One conversation of four turns, one after the other: probe and engine count the same."""
    flags = ("probe", "--workload", "multi_turn", "--sessions", "1")
    report = json.loads(nanovllm(*flags, "--json").stdout)
    assert report["source"]["prefix_mode"] == "observe" and report["source"]["served"] == 4
    assert report["figures"][-1]["overlap_tokens"] == report["source"]["potential_cached_tokens"] > 0
    lines = nanovllm(*flags, "--capacity", "2").stdout.splitlines()
    assert len(lines) == 3 and all(STATEMENT in line for line in lines)
    assert "prefix_mode observe" in lines[0]


def test_namespaces_are_told_apart(nanovllm: Run) -> None:
    report = json.loads(nanovllm("probe", "--workload", "multi_tenant", "--json").stdout)
    assert [figure["namespace"] for figure in report["figures"]] == [*(f"tenant-{i}" for i in range(4)), "*"]


def test_a_recorded_workload_gives_the_figures_of_the_live_one(nanovllm: Run, tmp_path: Path) -> None:
    """Per namespace, block size and cache; the prompts' tokens are not in the file."""
    path = tmp_path / "tenants.jsonl"
    sizes = ("--block-size", "16", "--block-size", "32", "--capacity", "64")
    live = json.loads(nanovllm("probe", "--workload", "multi_tenant", *sizes, "--record", str(path), "--json").stdout)
    again = json.loads(nanovllm("probe", str(path), *sizes, "--hash-block", "16", "--json").stdout)
    assert again["figures"] == live["figures"] and len(again["figures"]) == 2 * 2 * 5
    assert {frozenset(json.loads(line)) for line in path.read_text().splitlines()} == {
        frozenset({"timestamp", "input_length", "hash_ids", "namespace"})
    }


@pytest.mark.parametrize("arguments", [("a.jsonl", "--record", "b.jsonl"), ("--workload", "rag", "--record", "a/b/c")])
def test_what_cannot_be_recorded_is_refused(nanovllm: Run, arguments: tuple[str, ...]) -> None:
    done = nanovllm("probe", *arguments)
    assert done.returncode == 2 and "record" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("a.jsonl", "--workload", "rag")])
def test_one_source_is_needed(nanovllm: Run, arguments: tuple[str, ...]) -> None:
    done = nanovllm("probe", *arguments)
    assert done.returncode == 2 and "--workload" in done.stderr
