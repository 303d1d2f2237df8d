"""Two ways to run the command: in a process of its own, and within this one, where torch is loaded already."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "nanovllm"]
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def clean_env() -> dict[str, str]:
    """The environment without settings of this package; one thread, no colours, a fixed width."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NANOVLLM_") or k == "NANOVLLM_CACHE"}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def command(clean_env: dict[str, str]) -> Callable[..., Done]:
    """Run `nanovllm ARGUMENTS` as a process; never a traceback, whatever happens."""

    def run(*arguments: str, stdin: str = "", **env: str) -> Done:
        whole = clean_env | env
        done = subprocess.run([*COMMAND, *arguments], input=stdin.encode(), capture_output=True, env=whole, timeout=120)
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        assert "Traceback" not in err
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    return run


@pytest.fixture
def nanovllm(clean_env: dict[str, str]) -> Callable[..., Done]:
    """The same within this process: `main()`, its streams and environment replaced."""
    from nanovllm.cli.main import main

    def run(*arguments: str, stdin: str | bytes = "", **env: str) -> Done:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            for name in set(os.environ) - set(clean_env):
                patch.delenv(name)
            for name, value in (clean_env | env).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["nanovllm", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            main()
        out, err = (read_all(streams[name]) for name in ("stdout", "stderr"))
        assert "Traceback" not in err
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out, err)

    return run


def read_all(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


@pytest.fixture
def start(clean_env: dict[str, str]) -> Callable[..., subprocess.Popen[bytes]]:
    """Start the command and leave it running, its three streams as given."""

    def launch(*arguments: str, **streams: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*COMMAND, *arguments], env=clean_env, **streams)

    return launch
