"""`nanovllm serve`: what it refuses before it starts, in one sentence; what it prints when it starts."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from nanovllm.cli.flags import flag_of
from nanovllm.cli.serve import ServeSetup, Settings
from nanovllm.config import EngineConfig
from nanovllm.serve.config import setting_fields
from tests.serve.servers import ServerProcess

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], ["--api-key", "--insecure"]),  # noqa: S104  refused
        (["--host", "::", "--port", "0"], ["--api-key"]),
        (["--host", "192.0.2.1", "--api-key", "k", "--port", "0"], ["192.0.2.1", "listened"]),
        (["--port", "99999"], ["port", "65535"]),
        (["--port", "http"], ["port", "'http'"]),
        (["--block-size", "0"], ["block_size"]),
        (["--api-key", "a b"], ["printable"]),
        (["--api-key-file", "/nonexistent/keys"], ["/nonexistent/keys"]),
        (["--config", "/nonexistent/settings.toml"], ["/nonexistent/settings.toml"]),
        (["--limit-n", "17"], ["limit_n", "16"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_sentence(nanovllm: Run, arguments: list[str], words: list[str]) -> None:
    done = nanovllm("serve", "tiny:random", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("nanovllm: ") and all(word in last for word in words), done.stderr


def test_a_taken_port(nanovllm: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = nanovllm("serve", "tiny:random", "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"nanovllm: Port {port} on 127.0.0.1 is taken. Choose another with --port; 0 takes a free one."
    )


def test_bad_variables_and_files(nanovllm: Run, tmp_path: Path) -> None:
    done = nanovllm("serve", NANOVLLM_PORT="tcp://10.0.0.1:80")
    assert done.returncode == 2 and "NANOVLLM_PORT" in done.stderr
    path = tmp_path / "settings.toml"
    path.write_text("[server]\nhots = 'x'\n")
    done = nanovllm("serve", "--config", str(path))
    assert done.returncode == 2 and "'host'" in done.stderr


def test_a_missing_model(nanovllm: Run) -> None:
    done = nanovllm("serve", "./no/such/model.gguf", "--port", "0")
    assert done.returncode == 1 and done.stdout == ""
    assert "no/such/model.gguf" in done.stderr.splitlines()[-1]


def test_every_setting_is_shown_with_its_source(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("max_num_seqs = 8\n[server]\nttft_slo = 12\n[server.limits]\nn = 2\n")
    started = ServerProcess(
        "--config", str(path), "--max-queued-requests", "7", "--api-key", "bob:the-secret",
        "--state-remote", "redis://:the-secret@127.0.0.1:9/0",
        NANOVLLM_BLOCK_SIZE="32", NANOVLLM_ADMIN_KEY="the-admin-secret",
    )  # fmt: skip
    try:
        started.wait_ready()
        started.process.terminate()
        assert started.wait() == 0
        shown, out = started.errors(), started.out.decode()
    finally:
        started.end()
    rows = {
        row[0]: row[1:] for row in (re.split(r" {2,}", line.strip()) for line in shown.splitlines()) if len(row) == 3
    }
    names = [f.name for f in fields(EngineConfig)] + [name for name, _ in setting_fields()]
    assert list(rows) == names
    expected = {
        "model": ["tiny:random", "flag"], "port": ["0", "flag"], "max_num_seqs": ["8", "file"],
        "block_size": ["32", "environment"], "ttft_slo": ["12", "file"], "limit_n": ["2", "file"],
        "max_queued_requests": ["7", "flag"], "api_key": ["1 set", "flag"], "admin_key": ["set", "environment"],
        "state_remote": ["redis://***@127.0.0.1:9/0", "flag"],
        "host": ["127.0.0.1", "default"], "limit_body_bytes": ["8388608", "default"],
    }  # fmt: skip
    assert {name: rows[name] for name in expected} == expected
    assert "secret" not in shown + out
    assert re.search(r"^Serving tiny:random at http://127\.0\.0\.1:\d+$", out, re.MULTILINE)
    curl = out.splitlines()[1]
    assert curl.startswith("curl http://127.0.0.1:") and "$NANOVLLM_API_KEY" in curl


def test_the_curl_line_works() -> None:
    started = ServerProcess()
    try:
        curl = started.wait_ready().out.decode().splitlines()[1]
        done = subprocess.run(["bash", "-c", f"{curl} --silent --fail"], capture_output=True, timeout=60)
        assert done.returncode == 0 and b'"chat.completion"' in done.stdout
    finally:
        started.end()


def test_no_model_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLLM_MODEL", raising=False)
    setup = ServeSetup({}, {}, None, quiet=False)
    assert Settings.load(None, setup).engine.model == "smollm2"
    monkeypatch.setenv("NANOVLLM_MODEL", "tiny:random")
    settings = Settings.load(None, setup)
    assert (settings.engine.model, settings.sources["model"]) == ("tiny:random", "environment")
    assert Settings.load("other", setup).engine.model == "other"


def test_every_setting_has_its_flag(command: Run) -> None:
    done = command("serve", "--help", COLUMNS="80")
    shown = set(re.findall(r"^│ (--[a-z-]+)", done.stdout, re.MULTILINE))
    hidden = {"model", "enforce_eager", "tensor_parallel_size"}
    names = {f.name for f in fields(EngineConfig)} - hidden | {name for name, _ in setting_fields()}
    assert shown == {flag_of(name) for name in names} | {"--config", "--quiet", "--help"}
