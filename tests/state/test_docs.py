"""docs/state.md: its program runs, its tables agree with the code, and both languages say the same."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.store import StateStore

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("state.md", "state.zh.md")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_the_program_on_the_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    runpy.run_path("program.py")
    pinned, evicted, story = capsys.readouterr().out.splitlines()
    assert pinned == "1 pieces held in host, for 60 s" and evicted == "nothing may go: all is held"
    assert story == "['put', 'migrate', 'pin']"


@pytest.mark.parametrize("name", PAGES)
def test_every_public_call_is_on_the_page(name: str) -> None:
    calls = {call for call in vars(StateStore) if not call.startswith("_") and callable(getattr(StateStore, call))}
    assert calls - {"open", "close", "find"} <= set(re.findall(r"[`.]([a-z_]+)", page(name)))


@pytest.mark.parametrize("name", PAGES)
def test_every_kind_has_its_column(name: str) -> None:
    assert f"| | {' | '.join(KIND_TABLE)} |" in page(name)
