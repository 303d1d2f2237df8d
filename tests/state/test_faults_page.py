"""docs/faults.md: each row of the list has a test that exists, and both languages name the same ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.state.folders import KILL_POINTS

ROOT = Path(__file__).resolve().parents[2]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["faults.md", "faults.zh.md"])
def test_every_row_has_a_test_that_exists(name: str) -> None:
    rows = {line.split("|")[1].strip(): line for line in page(name).splitlines() if line.startswith("| S")}
    assert list(rows) == [f"S{i}" for i in range(1, 14)]
    assert all(TEST.search(row) for row in rows.values())
    for path, test in TEST.findall(page(name)):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (path, test)
    assert f"{len(KILL_POINTS)}" in rows["S2"] and len(KILL_POINTS) >= 12


def test_both_languages_name_the_same_tests() -> None:
    assert TEST.findall(page("faults.md")) == TEST.findall(page("faults.zh.md"))
