"""A conversation whose server is killed with -9 after every turn is the one that a living server has.

The proof is the benchmark itself (`benchmarks/sessions.py`), in float32; its times are not looked at here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def conversation(folder: Path, *arguments: str, timeout_s: float = 280) -> dict[str, Any]:
    """The benchmark's JSON line."""
    command = [sys.executable, "benchmarks/sessions.py", "--threads", "1", "--folder", str(folder), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_goes_on(told: dict[str, Any], turns: int) -> None:
    """Each answer equal; whatever a living server would reuse came from disk, but for a block or two."""
    assert told["turns_equal"] == told["turns"] == turns
    first, *later = told["rows"]
    assert first["hits"] == {} and later
    for row in later:
        assert set(row["hits"]) == {"disk"} and row["cached_tokens"] == row["hits"]["disk"]
        assert row["disk_share"] >= 0.9
    for growing in ("prompt_tokens", "kv_bytes"):
        assert [row[growing] for row in told["rows"]] == sorted({row[growing] for row in told["rows"]})
    assert all(row["t_queue_ms"] > 0 for row in told["rows"])


def test_three_turns_each_on_a_server_of_its_own(tmp_path: Path) -> None:
    told = conversation(
        tmp_path, "--model", "tiny:random", "--turns", "3", "--first-tokens", "60", "--answer-tokens", "8"
    )
    assert_goes_on(told, 3)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("api", ["responses", "chat"])
def test_twenty_turns_of_the_default_model(tmp_path: Path, smollm2_path: Path, api: str) -> None:
    told = conversation(tmp_path, "--model", str(smollm2_path), "--api", api, "--first-tokens", "300", timeout_s=1400)
    assert_goes_on(told, 20)
