"""docs/security.md: every attack has its row, every test it names exists, and both languages name the same ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs/security.md", ROOT / "docs/security.zh.md"]
ROWS = {str(number) for number in (*range(9, 34), 37, 38)}
ROWS |= {f"A{number}" for number in range(1, 8)} | {"K1", "K2"}


def shown_in(page: Path) -> dict[str, list[str]]:
    """The tests that each row of the page's tables names."""
    rows = re.findall(r"^\| ([AK]?\d+) \|(.*)\|$", page.read_text(encoding="utf-8"), re.M)
    return {number: re.findall(r"`(tests/\S+::\w+)`", text) for number, text in rows}


def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assigned = {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if hasattr(t, "id")}
    return assigned | {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_attack_has_tests_that_exist(page: Path) -> None:
    tests = shown_in(page)
    assert tests.keys() == ROWS and all(tests.values())
    for test in {test for row in tests.values() for test in row}:
        path, _, name = test.partition("::")
        assert name in names_in(path), test


def test_both_languages_name_the_same_tests() -> None:
    assert shown_in(PAGES[0]) == shown_in(PAGES[1])
