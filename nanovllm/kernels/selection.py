"""Devices, dtypes and kernel sets, chosen by name in one place.

What it is: the only module that asks the machine what it can do. What it knows
nothing about: models. Invariant: what a user names is honoured or refused, never
replaced silently; only `auto` chooses.
"""

from __future__ import annotations

import logging
import platform
import subprocess

import torch

from nanovllm.errors import ConfigError
from nanovllm.kernels.c_library import CompileError
from nanovllm.kernels.compiled import CompiledKernels
from nanovllm.kernels.cpu import CpuKernels
from nanovllm.kernels.cuda import CudaKernels
from nanovllm.kernels.interface import Kernels
from nanovllm.kernels.reference import ReferenceKernels

logger = logging.getLogger("nanovllm")

COMPILER_HINT = "Install gcc or clang, or the extra 'compiler' of this package."

_chosen_threads: int | None = None  # the one thing of the package that belongs to the process


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one. Raises ConfigError where `cuda` is asked for in vain."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available.", param="device", hint="Use device='cpu'.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: AVX512-BF16 or AMX, Arm FEAT_BF16, CUDA from Ampere on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if platform.machine().lower() in ("arm64", "aarch64"):
        return _arm_has_bfloat16()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_kernels(name: str, device: torch.device) -> Kernels:
    """`auto` takes the fastest set of the device that this machine can have, and says so where it is not the first.

    Raises ConfigError where set and device do not fit, or a set that was named cannot be compiled.
    """
    if name == "reference":
        return ReferenceKernels()
    needs = "cpu" if name == "compiled" else name
    if name != "auto" and needs != device.type:
        raise ConfigError(f"kernels {name!r} need device {needs!r}.", param="kernels", hint="Use kernels='auto'.")
    if device.type == "cuda":
        return CudaKernels()
    return CpuKernels() if name == "cpu" else _compiled(must=name == "compiled")


def _compiled(must: bool) -> Kernels:
    try:
        return CompiledKernels()
    except CompileError as error:
        if must:
            raise ConfigError(f"kernels.c: {error}.", param="kernels", hint=COMPILER_HINT) from error
        logger.warning("Kernels in torch operations only, which are slower: %s. %s", error, COMPILER_HINT)
        return CpuKernels()


def set_threads(count: int | None) -> None:
    """Set the process's kernel threads, once. A second engine that asks for another count is refused."""
    global _chosen_threads
    if count is None:
        return
    if _chosen_threads not in (None, count):
        raise ConfigError(
            f"This process already computes with {_chosen_threads} threads.",
            param="num_threads",
            hint="Thread count belongs to the process: leave num_threads out in the second engine.",
        )
    torch.set_num_threads(count)
    _chosen_threads = count


def _arm_has_bfloat16() -> bool:
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "hw.optional.arm.FEAT_BF16"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        return asked.stdout.strip() == "1"
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return " bf16" in file.read()
    except OSError:
        return False
