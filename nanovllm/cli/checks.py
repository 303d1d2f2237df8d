"""The checks of `nanovllm doctor`: each looks at one thing and says what it saw.

What it is: plain functions that return a `Check`. What it knows nothing about: how
results are shown. Invariants: a check changes nothing and downloads nothing; none
raises: what fails is a result.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from nanovllm import __version__
from nanovllm.core.cache_dir import cache_dir
from nanovllm.kernels.selection import COMPILER_HINT, choose_device, choose_dtype, choose_kernels, has_bfloat16
from nanovllm.models.hub import ALIASES

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "gguf", "jinja2", "msgspec", "huggingface-hub")
LOW_MEMORY_BYTES = 2 * 2**30
MATMUL_SIZE, MATMUL_S = 1024, 0.5


@dataclass(frozen=True)
class Check:
    """What one check saw. `state` is ok, advice or failed; the last two bring a problem and its fix."""

    name: str
    value: str
    state: str = "ok"
    problem: str | None = None
    fix: str | None = None


def all_checks() -> list[Check]:
    """Every check, quick ones first."""
    return [versions(), processor(), cores(), memory(), device(), dtype(), kernels(), model(), matmul(), self_test()]


def versions() -> Check:
    """The package's version, Python's and those of what it stands on."""
    found = [f"nanovllm {__version__}", f"Python {platform.python_version()}"]
    missing = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        names = ", ".join(missing)
        return Check("versions", ", ".join(found), "failed", f"Not installed: {names}.", "Run make install.")
    return Check("versions", ", ".join(found))


def processor() -> Check:
    """The instruction sets the kernels can use."""
    names = processor_features()
    value = f"{platform.machine()} on {platform.system()}: {', '.join(names) or 'no vector extension known'}"
    if platform.machine().lower() in ("x86_64", "amd64") and "AVX2" not in names:
        problem = "This processor has no AVX2: answers will be slow."
        return Check("processor", value, "advice", problem, "Use a machine from 2015 or later.")
    return Check("processor", value)


def processor_features() -> list[str]:
    """Names of the vector extensions that matter here, by torch's own detection."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ["NEON"] + (["BF16"] if has_bfloat16(torch.device("cpu")) else [])
    known = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX512": torch.cpu._is_avx512_supported,
        "AVX512-VNNI": torch.cpu._is_vnni_supported,
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported,
        "AMX": torch.cpu._is_amx_tile_supported,
    }
    return [name for name, is_supported in known.items() if is_supported()]


def cores() -> Check:
    """Cores this process may use, against the threads torch would start."""
    usable, threads = usable_cores(), torch.get_num_threads()
    value = f"{usable} usable of {os.cpu_count()}, {threads} torch threads"
    if threads > usable:
        problem = f"torch starts {threads} threads on {usable} usable cores; they will wait for each other."
        return Check("cores", value, "advice", problem, f"Pass --num-threads {usable}.")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > usable / 2:
        problem = (
            f"Other programs keep {load:.1f} of {usable} cores busy; threads that share a core wait for each other."
        )
        return Check("cores", value, "advice", problem, f"Close them, or pass --num-threads {max(1, usable // 2)}.")
    return Check("cores", value)


def usable_cores() -> int:
    """Cores by affinity and, in a container, by its CPU quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return count


def memory() -> Check:
    """Memory that is free for weights and KV."""
    state = psutil.virtual_memory()
    value = f"{state.available / 2**30:.1f} GiB free of {state.total / 2**30:.1f} GiB"
    if state.available < LOW_MEMORY_BYTES:
        problem = "Less than 2 GiB of memory is free; models beyond the smallest will not load."
        return Check("memory", value, "advice", problem, "Close other programs, or set --kv-memory 256MiB.")
    return Check("memory", value)


def device() -> Check:
    """The device that auto takes."""
    chosen = choose_device("auto")
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "the processor"
    return Check("device", f"auto takes {chosen.type} ({name})")


def dtype() -> Check:
    """The number format that auto takes."""
    chosen = str(choose_dtype("auto", choose_device("auto"))).removeprefix("torch.")
    why = "multiplied in hardware" if chosen == "bfloat16" else "this hardware does not multiply bfloat16"
    return Check("dtype", f"auto takes {chosen} ({why})")


def kernels() -> Check:
    """The kernel set that auto takes. Compiles it if it never was."""
    chosen = choose_kernels("auto", choose_device("auto"))
    if chosen.name != "cpu":
        return Check("kernels", f"auto takes {chosen.name}")
    problem = "The kernels written in C cannot be compiled here: answers will be slower."
    return Check("kernels", "auto takes cpu (torch operations only)", "advice", problem, COMPILER_HINT)


def model() -> Check:
    """Whether the default model is on this machine. Its digest is checked when it is opened."""
    path = cache_dir() / Path(ALIASES["smollm2"].member).name
    if path.is_file():
        return Check("model", f"smollm2: {path} ({path.stat().st_size / 1e6:.0f} MB)")
    problem = "The default model is not on this machine yet."
    return Check("model", f"smollm2: not in {cache_dir()}", "advice", problem, "Run nanovllm pull smollm2 (98 MB).")


def matmul() -> Check:
    """Throughput of a square matrix product in the format that auto takes."""
    chosen_device = choose_device("auto")
    chosen = choose_dtype("auto", chosen_device)
    square = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=chosen, device=chosen_device)
    _ = square @ square  # the first one packs and warms
    count, start_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - start_s) < MATMUL_S:
        float((square @ square)[0, 0])  # reading a number waits for the device
        count += 1
    gflops = 2 * MATMUL_SIZE**3 * count / elapsed_s / 1e9
    name = str(chosen).removeprefix("torch.")
    return Check("matmul", f"{gflops:,.0f} GFLOP/s (measured; {name}, {MATMUL_SIZE} x {MATMUL_SIZE})")


def self_test() -> Check:
    """A tiny random model through the real engine, twice: the answers must be equal."""
    start_s = time.perf_counter()
    try:
        first, second = _tiny_answer(), _tiny_answer()
    except Exception as error:  # noqa: BLE001  whatever it is, the doctor reports it
        problem = f"The self-test failed: {type(error).__name__}: {error}."
        return Check("self-test", "tiny:random did not answer", "failed", problem, "Run make install, then report it.")
    value = f"tiny:random answered {len(first)} tokens twice in {time.perf_counter() - start_s:.1f} s"
    if first != second:
        problem = "The same request gave two different answers."
        return Check("self-test", value, "failed", problem, "Try --kernels reference, and report the processor's row.")
    return Check("self-test", value)


def _tiny_answer() -> list[int]:
    """Greedy tokens of one small request through an engine of its own."""
    from nanovllm.core.sampling_params import SamplingParams
    from nanovllm.llm import LLM

    with LLM("tiny:random", dtype="float32", kv_memory="4MiB") as llm:
        return llm.generate("The doctor asks.", SamplingParams(temperature=0.0, max_tokens=32))[0].token_ids
