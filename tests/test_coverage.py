"""course/coverage.yaml: every requirement it lists is one of R1-R150, and what shows it exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
COVERAGE: dict[str, dict[str, str]] = yaml.safe_load((ROOT / "course/coverage.yaml").read_text(encoding="utf-8"))


def names_in(path: Path) -> set[str]:
    """Functions, classes and assigned names at the top of a test file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("requirement", COVERAGE)
def test_a_listed_requirement_is_shown_by_something_that_exists(requirement: str) -> None:
    assert requirement[0] == "R" and 1 <= int(requirement[1:]) <= 150
    entry = COVERAGE[requirement]
    assert entry["what"] and ("test" in entry) != ("command" in entry)
    if "command" in entry:
        program = entry["command"].split()
        assert program[0] in ("nanovllm", "make") or (ROOT / program[1]).is_file()
        return
    file, _, name = entry["test"].partition("::")
    assert (ROOT / file).is_file(), f"{file} is missing"
    assert not name or name in names_in(ROOT / file), f"{file} has no {name}"
