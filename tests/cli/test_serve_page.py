"""docs/serve.md: its five commands, run by a shell, end in a conversation that went on after kill -9.

Replaced: where the clone comes from, the port, and `make install`, which here makes `.venv/bin/nanovllm` out of the
environment that runs the tests. A shell types faster than a person: after each `serve` it waits for the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/serve.md", "docs/serve.zh.md")
MAKE = """#!/bin/sh
grep -q "^$1:" Makefile || exit 1
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec "{python}" -P -m nanovllm "$@"\\n' > .venv/bin/nanovllm
chmod +x .venv/bin/nanovllm
"""
READY = """until "{python}" -c 'import urllib.request as u; u.urlopen("{url}/health/ready")' 2> /dev/null
do kill -0 $! || exit 1; sleep 0.2; done"""


def blocks(page: str, language: str) -> list[str]:
    """What stands between fences of that language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if name == language
    ]


def commands(page: str) -> list[str]:
    """The five."""
    return blocks(page, "bash")[0].splitlines()


def test_both_languages_show_the_same_five() -> None:
    assert commands(PAGES[0]) == commands(PAGES[1]) and len(commands(PAGES[0])) == 5
    programs = [[re.sub("#.*", "", code) for code in blocks(page, "python")] for page in PAGES]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("model", ["tiny:random", pytest.param("smollm2", marks=pytest.mark.long)])
def test_a_conversation_goes_on_after_kill_9(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    if model == "smollm2":
        request.getfixturevalue("smollm2_path")
    port = free_port()
    script = [adapted(line, model, port) for line in commands(PAGES[0])]
    done = shell(tmp_path, [*script, *looks(port)])
    kept, explained = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"'))
    said = [part["text"] for m in kept["content"]["messages"] if m["role"] == "user" for part in m["content"]]
    assert said == re.findall(r'echo "(.*?)"', "\n".join(script)) and len(said) == 2
    loads = [receipt for receipt in explained["receipts"] if receipt["action"] == "load"]
    assert loads and loads[0]["ok"] and loads[0]["tier"] == "disk"
    assert re.search(
        r"Session trip goes on: 2 messages;.*\n(\d+) of \d+ prompt tokens were cached \(disk \1\)\.", done.stderr
    )


def test_the_rest_of_the_page_runs(tmp_path: Path) -> None:
    """The client's program, and the operator's commands; they find the server by the folder it has."""
    port, page = free_port(), PAGES[0]
    program, listed = blocks(page, "python")[0], [line.split("#")[0] for line in blocks(page, "")[1].splitlines()]
    (tmp_path / "program.py").write_text(program.replace(":8000", f":{port}").replace("smollm2", "tiny:random"))
    setting_up = [adapted(line, "tiny:random", port) for line in commands(page)[:3]]
    lines = [*setting_up, f'"{sys.executable}" -P ../program.py', *(f".venv/bin/{line}" for line in listed)]
    done = shell(tmp_path, lines)
    assert int(done.stdout.split("state_id")[0].split()[-1]) >= 16  # cached tokens of the client's second turn
    assert len(listed) == 5 and "trip" in done.stdout and "used_bytes" in done.stdout


def looks(port: int) -> list[str]:
    """What the server has of the conversation, and what happened to it."""
    where = f"trip --json --url http://127.0.0.1:{port}"
    return [f".venv/bin/nanovllm state {verb} {where}" for verb in ("show", "explain")]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def adapted(line: str, model: str, port: int) -> str:
    """The page's command for this machine; where it starts a server, the next one waits for it."""
    line = line.replace("serve smollm2", f"serve {model} --port {port}").replace(":8000", f":{port}")
    waiting = READY.format(python=sys.executable, url=f"http://127.0.0.1:{port}")
    return f"{line}\n{waiting}" if line.endswith("&") else line


def shell(folder: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Run them as one program of bash; whatever it started is ended."""
    (folder / "make").write_text(MAKE.format(python=sys.executable))
    (folder / "make").chmod(0o755)
    settings = {
        "NANOVLLM_MAX_MODEL_LEN": "2048",
        "NANOVLLM_KV_MEMORY": "64MiB",
        "NANOVLLM_STATE_LOAD": "always",
        "OMP_NUM_THREADS": "1",
    }
    env = {**os.environ, **settings, "REPOSITORY": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}"}
    script = "\n".join(["trap 'kill -9 $!' EXIT", *lines])
    process = subprocess.Popen(
        ["bash", "-ec", script], cwd=folder, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, (out[-2000:], err[-2000:])
    return subprocess.CompletedProcess(lines, 0, out, err)
