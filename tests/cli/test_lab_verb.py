"""`nanovllm lab`: run and check from the command line, in both languages, with exit codes a script can use."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.lab.students import COUNTER

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_run_then_check(nanovllm: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(COUNTER, encoding="utf-8")
    out = str(tmp_path / "out")
    flags = ("--quick", "--simulated", "--lang", "zh", "--observer", f"{tmp_path / 'mine.py'}:Counter")
    done = nanovllm("lab", "run", "4", "--out", out, *flags)
    assert done.returncode == 0 and "因果链：holds" in done.stdout and "run 21 of 21" in done.stderr
    assert done.stdout.count("[simulated]") == 15 and done.stdout.count("[estimated]") == 3
    command = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["command"]
    assert command == (
        "nanovllm lab run 4 --out out --simulated --quick --seed 0 --repeats 3 --lang zh --observer mine.py:Counter"
    )
    again = nanovllm("lab", "run", "4", "--out", out, *flags)
    assert again.returncode == 2 and "never overwritten" in again.stderr
    checked = nanovllm("lab", "check", "4", out)
    assert checked.returncode == 0 and "every rule holds" in checked.stdout and "✘" not in checked.stdout
    handed_in = nanovllm("lab", "check", "4", out, "--submission", "--lang", "zh")
    assert handed_in.returncode == 1 and "仍有草稿标记" in handed_in.stdout
    document = json.loads(nanovllm("lab", "check", "4", out, "--submission", "--json").stdout)
    assert document["verdict"] == "fail" and document["rules"]["draft"] is False and document["rules"]["cell"] is True


def test_what_cannot_be_run_or_checked_is_one_sentence(nanovllm: Run, tmp_path: Path) -> None:
    cases = [
        (("run", "7", "--out", "x"), "There is no experiment 7"),
        (("run", "4", "--out", "x", "--observer", "nothing.py:A"), "There is no observer"),
        (("run", "4", "--out", str(tmp_path / "new"), "--model", "/nowhere.gguf"), "/nowhere.gguf"),
        (("run", "4", "--out", str(tmp_path / "no"), "--simulated", "--model", "nope"), "--simulated runs no model"),
        (("check", "4", str(tmp_path / "nothing")), "manifest.json cannot be read"),
        (("check", "9", str(tmp_path)), "There is no experiment 9"),
    ]
    for arguments, sentence in cases:
        done = nanovllm("lab", *arguments)
        assert done.returncode in (1, 2) and sentence in done.stderr, arguments
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["status"] == "failed"
    assert not (tmp_path / "no").exists()
    checked = nanovllm("lab", "check", "4", str(tmp_path / "new"))
    assert checked.returncode == 1 and "✘ status" in checked.stdout and "– chain" in checked.stdout
    assert "✔ chain" not in checked.stdout and "(not evaluated)" in checked.stdout
    rules = json.loads(nanovllm("lab", "check", "4", str(tmp_path / "new"), "--json").stdout)["rules"]
    assert rules["status"] is False and rules["cell"] is rules["observer"] is None
