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
