"""The pages that show commands with their output show what those commands print, in both languages."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/capacity", "docs/probe", "docs/policies", "docs/experiment_4", "docs/observe")
SHOWN = re.compile(r"^```\n\$ nanovllm (.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def shown_in(page: str) -> list[tuple[str, str]]:
    """Each command with the lines under it."""
    return SHOWN.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_show_the_same(page: str) -> None:
    assert shown_in(f"{page}.md") == shown_in(f"{page}.zh.md") != []


@pytest.mark.parametrize("page", PAGES)
def test_each_command_prints_what_is_shown(
    nanovllm: Callable[..., subprocess.CompletedProcess[str]],
    smollm2_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page: str,
) -> None:
    """Line by line and in order; `...` stands for lines left out."""
    monkeypatch.chdir(tmp_path)
    for command, shown in shown_in(f"{page}.md"):
        done = nanovllm(*shlex.split(command), COLUMNS="80")
        printed = [line.rstrip() for line in done.stdout.splitlines()]
        expected = [line for line in shown.splitlines() if line != "..."]
        start = printed.index(expected[0])
        assert printed[start : start + len(expected)] == expected, command
