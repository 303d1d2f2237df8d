"""`nanovllm lab cache`: labels beside every figure, the bounds beside every policy, bad flags refused."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.lab.cache_comparison import ALL_POLICIES
from tests.observe.test_prefix_trace import ROWS, written

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"^```\n\$ python -m nanovllm (lab cache benchmarks.*)\n((?:.*\n)*?)```$", re.MULTILINE)
TABLES = SHOWN.findall((ROOT / "docs/policies.md").read_text(encoding="utf-8"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return written(tmp_path / "trace.jsonl", ROWS)


def test_the_tables_name_their_labels_and_their_bounds(nanovllm: Run, trace: Path, tmp_path: Path) -> None:
    done = nanovllm("lab", "cache", str(trace), "--capacity", "2", "--capacity", "3", "--plot", str(tmp_path / "p.svg"))
    assert done.returncode == 0
    assert "infinite cache: 6 blocks found, 60.0%" in done.stdout  # 10 blocks named, 4 distinct
    assert "simulated" in done.stdout and "saved prefill, seconds (estimated)" in done.stdout
    assert "lengths /32" in done.stdout and "T(cached, new) = 10 + 0.3 new" in done.stdout
    for name in (*ALL_POLICIES, "infinite"):
        assert sum(line.split()[:1] == [name] for line in done.stdout.splitlines()) >= 2
    picture = (tmp_path / "p.svg").read_text()
    assert all(name in picture for name in ALL_POLICIES) and "simulated" in picture


def test_prose_comes_in_chinese_and_labels_stay(nanovllm: Run, trace: Path) -> None:
    asked = ("lab", "cache", str(trace), "--policy", "lru", "--capacity", "2")
    done = {lang: nanovllm(*asked, "--lang", lang).stdout for lang in ("en", "zh")}
    assert "无限缓存：命中 6 块，60.0%" in done["zh"] and "infinite cache" not in done["zh"]
    numbers = [re.findall(r"\d[\d,.]*%?|simulated|estimated|lru", text.replace("/2", "")) for text in done.values()]
    assert sorted(numbers[0]) == sorted(numbers[1])


def test_the_document_has_every_run_with_its_prices(nanovllm: Run, trace: Path) -> None:
    flags = ("--policy", "lru", "--policy", "clairvoyant", "--capacity", "2", "--scale", "1", "--cost", "1,0.5,0")
    document = json.loads(nanovllm("lab", "cache", str(trace), *flags, "--json").stdout)
    assert document["label"] == "simulated" and document["costs"]["label"] == "estimated"
    assert document["trace"]["block_tokens"] == 512 and document["trace"]["length_scale"] == "1/1"
    lru, clairvoyant = document["runs"]
    assert (lru["policy"], clairvoyant["policy"]) == ("lru", "clairvoyant")
    assert lru["hit_blocks"] <= clairvoyant["hit_blocks"] <= document["infinite"]["hit_blocks"] == 6
    assert lru["prefill_ms"] == 4 * 1 + 0.5 * 4412
    assert lru["saved_ms"] == 0.5 * lru["hit_tokens"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--policy", "mru"), "lru, lfu"),
        (("--cost", "1,nan,0"), "--cost"),
        (("--ttl", "nan"), "ttl"),
        (("--half-life", "0"), "half"),
        (("--scale", "3"), "scale"),
        (("--plot", "x.pdf"), "plot"),
        (("--hash-block", "256"), "hash_block"),
    ],
)
def test_flags_that_cannot_be_are_refused(nanovllm: Run, trace: Path, flags: tuple[str, ...], word: str) -> None:
    done = nanovllm("lab", "cache", str(trace), *flags)
    assert done.returncode == 2 and word in done.stderr


def test_both_pages_show_the_same_tables() -> None:
    assert len(TABLES) == 4
    assert SHOWN.findall((ROOT / "docs/policies.zh.md").read_text(encoding="utf-8")) == TABLES


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("command", "shown"), TABLES, ids=["conversation", "synthetic", "full_length", "second_sight"])
def test_the_pages_tables_are_what_the_commands_print(
    nanovllm: Run, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    monkeypatch.chdir(ROOT)
    done = nanovllm(*shlex.split(command), COLUMNS="80")
    assert [line.rstrip() for line in done.stdout.splitlines()] == shown.splitlines()


def test_two_cells_of_the_pages_tables(nanovllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of them is a long test."""
    monkeypatch.chdir(ROOT)
    trace, capacity = "benchmarks/traces/mooncake_synthetic_trace.jsonl.gz", 4392
    flags = ("--capacity", str(capacity), "--policy", "lru", "--policy", "pgdsf", "--json")
    document = json.loads(nanovllm("lab", "cache", trace, *flags).stdout)
    shown = next(table for command, table in TABLES if "synthetic" in command).splitlines()
    column = next(line.split() for line in shown if line.startswith("blocks")).index(f"{capacity:,}")
    for run in document["runs"]:
        row = next(line.split() for line in shown if line.startswith(f"{run['policy']} "))
        assert row[column] == f"{100 * run['token_hit_share']:.1f}"
