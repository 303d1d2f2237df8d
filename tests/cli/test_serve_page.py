"""docs/serve.md: its five commands, run by a shell, end in a conversation that went on after kill -9.

Replaced: where the clone comes from, the port, and `make install`, which here makes `.venv/bin/nanovllm` out of the
environment that runs the tests. A shell types faster than a person: after each `serve` it waits for the server.
"""

from __future__ import annotations

import json
import os
import re
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


def commands(page: str) -> list[str]:
    """Those of the first block."""
    found = re.search(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1].splitlines()


def test_both_languages_show_the_same_five() -> None:
    assert commands(PAGES[0]) == commands(PAGES[1]) and len(commands(PAGES[0])) == 5


@pytest.mark.parametrize("model", ["tiny:random", pytest.param("smollm2", marks=pytest.mark.long)])
def test_a_conversation_goes_on_after_kill_9(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    if model == "smollm2":
        request.getfixturevalue("smollm2_path")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = [adapted(line, model, port) for line in commands(PAGES[0])]
    looks = [
        f".venv/bin/nanovllm state {verb} trip --json --url http://127.0.0.1:{port}" for verb in ("show", "explain")
    ]
    done = shell(tmp_path, ["set -e", *script, *looks, "kill -9 $!"])
    kept, explained = map(json.loads, done.stdout.splitlines()[-2:])
    said = [part["text"] for m in kept["content"]["messages"] if m["role"] == "user" for part in m["content"]]
    assert said == re.findall(r'echo "(.*?)"', "\n".join(script)) and len(said) == 2
    loads = [receipt for receipt in explained["receipts"] if receipt["action"] == "load"]
    assert loads and loads[0]["ok"] and loads[0]["tier"] == "disk"


def adapted(line: str, model: str, port: int) -> str:
    """The page's command for this machine; where it starts a server, the next one waits for it."""
    line = line.replace("serve smollm2", f"serve {model} --port {port}").replace(":8000", f":{port}")
    return (
        f"{line}\n{READY.format(python=sys.executable, url=f'http://127.0.0.1:{port}')}" if line.endswith("&") else line
    )


def shell(folder: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Run them as one program of bash; whatever it started is ended."""
    (folder / "make").write_text(MAKE.format(python=sys.executable))
    (folder / "make").chmod(0o755)
    settings = {
        "NANOVLLM_MAX_MODEL_LEN": "512",
        "NANOVLLM_KV_MEMORY": "64MiB",
        "NANOVLLM_STATE_LOAD": "always",
        "OMP_NUM_THREADS": "1",
    }
    env = {**os.environ, **settings, "REPOSITORY": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(lines)], cwd=folder, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=200)
    finally:
        subprocess.run(["kill", "-9", f"-{process.pid}"], check=False, capture_output=True)
    assert process.returncode == 0, (out[-2000:], err[-2000:])
    return subprocess.CompletedProcess(lines, 0, out, err)
