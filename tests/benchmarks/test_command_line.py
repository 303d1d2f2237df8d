"""What a person may type wrongly at a benchmark, and a command that does not end."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import bars
import command
import peers.comparison
import pytest

from nanovllm.errors import ConfigError

ROOT = Path(bars.ROOT)


def test_peers_says_what_is_wrong(tmp_path: Path) -> None:
    """A setting, and a model; no environment is built: those that cannot be written are missing at once."""
    (tmp_path / "file").touch()
    script = [sys.executable, "benchmarks/peers.py", "--envs", str(tmp_path / "file"), "--peers", "vllm"]

    def said(*words: str) -> str:
        done = subprocess.run([*script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        return done.stderr

    assert "num_blocks cannot be read from 'many'" in said("--set", "num_blocks=many")
    assert "There is no file or directory '/none'" in said("--model", "/none", "--only", "one_stream")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_a_count_is_a_whole_number_from_one_on(text: str) -> None:
    assert command.at_least_one("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number from 1 on"):
        command.at_least_one(text)


def test_an_error_is_one_line_with_its_mend() -> None:
    def main() -> None:
        raise ConfigError("It is off.", hint="Mend it.")

    with pytest.raises(SystemExit, match=r"^It is off\. Mend it\.$"):
        command.told(main)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}'])
def test_a_file_that_resume_did_not_write_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kept.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="not what --resume wrote"):
        peers.comparison.Record.load(path, {})


def test_a_command_out_of_time_is_asked_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, it would leave behind what it started."""
    monkeypatch.setattr(bars, "TIMEOUT_S", 3)
    mark = tmp_path / "ended"
    script = (
        "import pathlib, signal, sys, time; "
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(mark)!r}).touch(), sys.exit(1))); time.sleep(60)"
    )
    assert bars.run(f'python -c "{script}"') == {"error": "no answer in 3 s"}
    assert mark.exists()
