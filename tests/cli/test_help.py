"""What `--help` says: verbs and flags, by name; a change here is a change people notice."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import fields

import pytest

from nanovllm.cli.flags import _NOT_FLAGS, flag_of
from nanovllm.config import EngineConfig
from nanovllm.serve.config import setting_fields

Run = Callable[..., subprocess.CompletedProcess[str]]
OUTPUT = {"--log", "--events", "--events-blocks", "--quiet"}
SAMPLING = {
    "--frequency-penalty",
    "--ignore-eos",
    "--max-tokens",
    "--min-p",
    "--min-tokens",
    "--presence-penalty",
    "--repetition-penalty",
    "--seed",
    "--stop",
    "--temperature",
    "--top-k",
    "--top-p",
}
ENGINE = {
    "--block-size",
    "--check-invariants",
    "--config",
    "--device",
    "--dtype",
    "--event-capacity",
    "--gpu-memory-utilization",
    "--kernels",
    "--kv-memory",
    "--log-blocks",
    "--max-model-len",
    "--max-new-requests-per-step",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--max-prefill-beside-decode",
    "--max-prefill-chunk",
    "--num-blocks",
    "--num-threads",
    "--policy",
    "--state-dir",
    "--state-host-memory",
    "--state-disk-quota",
    "--state-tenant-bytes",
    "--state-tenant-objects",
    "--state-remote",
    "--state-remote-key-file",
    "--state-load",
    "--prefill-during-decode",
    "--prefix-mode",
    "--quantization",
    "--schedule-mode",
    "--time-blocks",
    "--watermark",
}
STATE = {"--state-dir", "--url", "--api-key", "--json", "--help"}
OWN = {"--name", "--version", "--namespace", "--ttl"}
DOCUMENT = {"--system", "--template", "--public", "--wait"}
SNAPSHOT = {
    "run": {"--system", "--raw", "--timeline", "--json", "--help"} | OUTPUT | SAMPLING | ENGINE,
    "chat": {"--system", "--session", "--knowledge", "--url", "--api-key", "--model", "--help"}
    | OUTPUT
    | SAMPLING
    | ENGINE,
    "serve": {flag_of(name) for name, _ in setting_fields()} | {"--help", "--quiet", "--seed"} | ENGINE,
    "pull": {"--json", "--quiet", "--help"},
    "doctor": {"--json", "--help"},
    "capacity": {
        "--memory",
        "--with-weights",
        "--block-size",
        "--dtype",
        "--max-model-len",
        "--prompt",
        "--output",
        "--shared-prefix",
        "--compare",
        "--workload",
        "--requests",
        "--seed",
        "--plot",
        "--json",
        "--help",
    },
    "probe": {
        "--block-size",
        "--capacity",
        "--hash-block",
        "--workload",
        "--record",
        "--sessions",
        "--num-blocks",
        "--seed",
        "--json",
        "--help",
    },
    "bench serve": {
        "--url",
        "--model",
        "--api-key",
        "--endpoint",
        "--input-len",
        "--output-len",
        "--range-ratio",
        "--prefix-len",
        "--vocab",
        "--workload",
        "--prompts",
        "--temperature",
        "--ignore-eos",
        "--num-requests",
        "--request-rate",
        "--burstiness",
        "--concurrency",
        "--warmup",
        "--timeout",
        "--seed",
        "--slo",
        "--json",
        "--help",
    },
    "trace record": {"--sessions", "--concurrency", "--rate", "--length", "--output-len", "--seed", "--help"}
    | OUTPUT
    | ENGINE,
    "trace show": {"--request", "--slo", "--json", "--lang", "--help"},
    "trace export": {"--perfetto", "--mermaid", "--svg", "--request", "--lang", "--help"},
    "trace compare": {"--slo", "--force", "--json", "--lang", "--help"},
    "trace diagnose": {"--request", "--from", "--to", "--json", "--lang", "--help"},
    "lab run": {
        "--lang",
        "--model",
        "--num-threads",
        "--observer",
        "--out",
        "--quick",
        "--repeats",
        "--seed",
        "--simulated",
        "--help",
    },
    "lab check": {"--submission", "--json", "--lang", "--help"},
    "lab cache": {
        "--policy",
        "--capacity",
        "--requests",
        "--ttl",
        "--half-life",
        "--second-sight",
        "--scale",
        "--hash-block",
        "--cost",
        "--kv-bytes",
        "--plot",
        "--json",
        "--lang",
        "--help",
    },
    "state ls": STATE | {"--kind", "--name", "--namespace", "--limit", "--after"},
    "state show": STATE | {"--namespace"},
    "state put": STATE | OWN | DOCUMENT | {"--messages", "--token-ids", "--kind", "--durable"},
    "state pin": STATE | {"--device", "--ttl", "--namespace"},
    "state unpin": STATE | {"--device", "--namespace"},
    "state migrate": STATE | {"--namespace"},
    "state evict": STATE | {"--policy", "--bytes", "--kind", "--tier"},
    "state drop": STATE | {"--namespace"},
    "state fork": STATE | OWN,
    "state export": STATE | {"--out", "--namespace"},
    "state import": STATE | {"--name", "--version", "--namespace"},
    "state verify": STATE | {"--tier", "--repair"},
    "state explain": STATE | {"--namespace"},
    "state top": STATE,
}


def options(help_text: str) -> set[str]:
    """The flags of the tables, not those of the examples."""
    return set(re.findall(r"^│ (?:\*? +)?(--[a-z-]+)", help_text, re.MULTILINE))  # a star: it must be given


def test_verbs(command: Run) -> None:
    done = command("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert re.findall(r"^│ ([a-z]+) ", done.stdout, re.MULTILINE) == list(
        dict.fromkeys(verb.split()[0] for verb in SNAPSHOT)
    )
    assert options(done.stdout) == {"--version", "--help"}
    for word in ("NANOVLLM_BLOCK_SIZE", "--config", "Exit codes", "NANOVLLM_DEBUG"):
        assert word in done.stdout


@pytest.mark.parametrize("verb", SNAPSHOT)
def test_flags(nanovllm: Run, verb: str) -> None:
    done = nanovllm(*verb.split(), "--help", COLUMNS="80")  # the narrowest usual terminal cuts no name
    assert options(done.stdout) == SNAPSHOT[verb]
    assert "Examples:" in done.stdout and f"nanovllm {verb}" in done.stdout


def test_every_setting_has_a_flag() -> None:
    assert {flag_of(f.name) for f in fields(EngineConfig) if f.name not in _NOT_FLAGS} == ENGINE - {"--config"}


def test_version(command: Run) -> None:
    from nanovllm import __version__

    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"nanovllm {__version__}\n", "")


def test_pull_says_where_the_model_lies(nanovllm: Run) -> None:
    done = nanovllm("pull", "tiny:random", "--json")
    assert json.loads(done.stdout) == {"model": "tiny:random", "path": None, "bytes": 0}
    assert "built in" in done.stderr


def test_doctor(command: Run, nanovllm: Run) -> None:
    report = json.loads(command("doctor", "--json").stdout)
    assert report["ok"] is True
    names = ["versions", "processor", "cores", "memory", "device", "dtype", "kernels", "model", "matmul", "self-test"]
    assert [check["name"] for check in report["checks"]] == names
    assert all(check["fix"] for check in report["checks"] if check["problem"])
    table = nanovllm("doctor")
    assert table.returncode == 0 and "self-test" in table.stdout and "GFLOP/s" in table.stdout
