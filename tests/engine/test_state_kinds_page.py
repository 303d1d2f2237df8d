"""docs/state_kinds.md: its words are the kinds' own, its rows those that the command measures, in both languages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm.state.kinds.table import COLUMNS, KIND_TABLE

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/state_kinds.md", "docs/state_kinds.zh.md")
EXAMPLES = {
    "docs/state_kinds.md": "KV, activations, scheduling metadata, retrieval results, knowledge chunks, index caches, "
    "session history, agent memory, tool context",
    "docs/state_kinds.zh.md": "KV, 激活, 调度元数据, 检索结果, 知识块, 索引缓存, 会话历史, 智能体记忆, 工具上下文",
}


def measured_on(page: str) -> list[str]:
    """The lines between the marks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (found,) = re.findall(r"<!-- measured: python benchmarks/state_kinds.py --write -->\n(.*?)<!-- end -->", text, re.S)
    return found.splitlines()


def first_cells(lines: list[str]) -> list[str]:
    return [line.split("|")[1].strip() for line in lines if line.startswith("| ")]


def test_the_words_are_those_of_the_code() -> None:
    text = (ROOT / PAGES[0]).read_text(encoding="utf-8")
    kinds = [KIND_TABLE[name] for name in ("kv", "knowledge", "session")]
    for column in COLUMNS:
        assert f"| {column} | {' | '.join(str(getattr(kind, column)) for kind in kinds)} |\n" in text


@pytest.mark.parametrize("page", PAGES)
def test_every_example_of_the_lecture_has_a_place(page: str) -> None:
    cells = first_cells((ROOT / page).read_text(encoding="utf-8").splitlines())
    assert set(EXAMPLES[page].split(", ")) <= set(cells)


ANSWERED = {
    "docs/state_kinds.md": (
        "Which to probe first",
        "Session memory and KV",
        'Why "state organisation"',
        "For the discussion",
    ),
    "docs/state_kinds.zh.md": ("先探测哪一类", "会话记忆与 KV", "为什么是“状态组织”", "课堂讨论"),
}


@pytest.mark.parametrize("page", PAGES)
def test_each_exercise_and_discussion_has_an_answer(page: str) -> None:
    sections = re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)[4:]
    assert len(sections) == len(ANSWERED[page])
    for section, title in zip(sections, ANSWERED[page], strict=True):
        assert section.startswith(title) and len(section.strip().splitlines()) > 2
    assert len(re.findall(r"^\*.*[?？]\* \S", sections[-1], flags=re.M)) == 2


def test_the_command_measures_what_the_pages_show(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/state_kinds.py", "--quick", "--model", "tiny:random", "--dtype", "float32"]
    command += ["--threads", "1", "--folder", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *printed, last = done.stdout.splitlines()
    assert measured_on(PAGES[0]) == measured_on(PAGES[1])
    assert first_cells(measured_on(PAGES[0])) == first_cells(printed)
    told = json.loads(last)
    assert told["label"] == "measured" and list(told["kinds"]) == ["kv", "knowledge", "session"]
    assert all(kind["found again, tokens"] >= 256 for kind in told["kinds"].values())
