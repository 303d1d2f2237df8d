"""The C kernels as loaded code: found in the user's cache, or compiled there first.

What it is: the search for a compiler ($CC, or the first of cc, gcc, clang and the `ziglang` wheel
that compiles this), one compilation per element type and instruction set, and the call signatures.
What it knows nothing about: tensors. Invariants: the file's name is a hash of the source, the flags and the
compiler, and it appears whole or not at all; nothing is loaded from a folder or file that
another user may write to; compiling needs no OpenMP: torch's own pool of threads is handed
over as a function.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nanovllm.core.cache_dir import cache_dir

logger = logging.getLogger("nanovllm")

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / f"{name}.c" for name in ("kernels", "grouped", "panels", "decoder", "choice", "team"))
HEADERS = tuple(FOLDER / f"{name}.h" for name in ("kernels", "vectors", "words", "decode", "prefill"))
DEFINES = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-pthread")
LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3", "DEFAULT": "x86-64-v2"}  # by torch's name of what it uses
TIMEOUT_S = 120
NAMES = (
    "add_norm",
    "silu_mul",
    "attend_layer",
    "grouped_linear",
    "panel_linear",
    "panel_width",
    "run_decoder",
    "choose_tokens",
    "team_open",
    "team_call",
    "team_dismiss",
    "team_close",
)

ADDRESS, COUNT, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class StepArgs(ctypes.Structure):
    """`step_args` of kernels.h, field by field."""

    _fields_ = (
        *((name, COUNT) for name in ("num_tokens", "num_decodes", "num_units", "heads", "kv_heads", "dim")),
        *((name, COUNT) for name in ("block_size", "block_stride", "max_blocks", "window")),
        *((name, ADDRESS) for name in ("slot_blocks", "slot_offsets", "tables", "decodes", "decode_rows", "contexts")),
        *((name, ADDRESS) for name in ("unit_seqs", "first_units", "partial")),
        ("num_tiles", COUNT),
        *((name, ADDRESS) for name in ("tile_seqs", "tile_rows", "tile_counts", "tile_positions", "parallel")),
        ("threads", COUNT),
        ("scale", REAL),
        *((name, ADDRESS) for name in ("qkv", "kv", "cos", "sin", "out")),
    )


class GroupedArgs(ctypes.Structure):
    """`grouped_args` of kernels.h, field by field."""

    _fields_ = (
        *((name, ADDRESS) for name in ("codes", "scales", "offsets", "bias", "x", "y")),
        *((name, COUNT) for name in ("rows", "inputs", "outputs", "bits", "is_float")),
    )


class PanelArgs(ctypes.Structure):
    """`panel_args` of kernels.h, field by field."""

    _fields_ = (
        *((name, ADDRESS) for name in ("panels", "bias", "x", "y")),
        *((name, COUNT) for name in ("rows", "inputs", "outputs", "is_float")),
    )


class CompileError(Exception):
    """There is no compiler, or it failed; the text says which. Caught where kernels are chosen."""


def load(dtype: torch.dtype, instructions: list[str] | None = None) -> ctypes.CDLL:
    """The library for one element type, compiled if it is not in the cache, for `instructions` or else `target()`.

    Raises CompileError.
    """
    path = _find_or_compile(dtype, instructions)
    try:
        _check_private(path)
        return _with_signatures(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)  # the next start compiles again
        raise CompileError(f"{path} cannot be loaded: {error}") from error


def _find_or_compile(dtype: torch.dtype, instructions: list[str] | None) -> Path:
    """One that lies there, or by the first compiler that can: an old one may not know the instruction set."""
    folder, paths, failures = _private_folder(cache_dir() / "kernels"), {}, []
    sources = b"".join(path.read_bytes() for path in (*HEADERS, *SOURCES))
    for compiler in compilers():
        flags = target(compiler) if instructions is None else instructions
        command = (*compiler, *FLAGS, *flags, *DEFINES[dtype])
        key = hashlib.sha256(repr((command, processor())).encode() + sources).hexdigest()[:32]
        paths[command] = folder / f"{str(dtype).removeprefix('torch.')}-{key}.so"
    if found := next(filter(Path.exists, paths.values()), None):
        return found
    for command, path in paths.items():
        try:
            _compile(command, path)
            return path
        except CompileError as error:
            failures.append(str(error))
    raise CompileError("; ".join(failures))


def compilers() -> list[list[str]]:
    """Commands that compile C, in the order in which they are tried: $CC alone if it is set. Raises CompileError."""
    if named := os.environ.get("CC"):
        try:
            return [shlex.split(named)]
        except ValueError as error:
            raise CompileError(f"$CC is {named!r}, which is no command: {error}") from error
    found = [[path] for path in map(shutil.which, ("cc", "gcc", "clang")) if path]
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc"])
    if not found:
        raise CompileError("no C compiler was found")
    return found


def target(compiler: list[str]) -> list[str]:
    """The instruction set torch's own kernels use, so that one setting caps both, in this compiler's flags."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["-mcpu=native"]
    capability = torch.backends.cpu.get_cpu_capability()
    level = LEVELS.get(capability, "x86-64-v2")
    bfloat16 = capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return [march(level, compiler), "-mavx512bf16"] if bfloat16 else [march(level, compiler)]


def processor() -> list[str]:
    """What -mcpu=native stands for on Arm under Linux; nothing where the command names the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("Features", "CPU implementer", "CPU part"))})


def march(level: str, compiler: list[str]) -> str:
    """The flag for a level of x86-64, as this compiler spells it."""
    return "-march=" + (level.replace("-", "_") if "ziglang" in compiler else level)


def _compile(command: tuple[str, ...], path: Path) -> None:
    # a warning: in a script that set up no logging nothing less is shown, and the first start waits here for seconds
    logger.warning("Compiling %s with %s, once for this machine ...", path.name, command[0])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
            made = Path(scratch) / "kernels.so"
            done = subprocess.run(
                [*command, *map(str, SOURCES), "-o", str(made)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
            if done.returncode != 0 or not made.exists():
                raise CompileError(f"{command[0]} failed: {done.stderr.strip()[:500]}")
            made.chmod(0o700)
            os.replace(made, path)
    except (OSError, subprocess.TimeoutExpired) as error:  # no such compiler, or a disk that is full or read-only
        raise CompileError(f"{command[0]} could not compile: {error}") from error


def _private_folder(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(f"{folder} cannot be made: {error}") from error
    _check_private(folder)
    return folder


def _check_private(path: Path) -> None:
    """What is loaded runs: it must be ours, and nobody else's to write."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompileError(f"{path} can be written by others")


def _with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    library.add_norm.argtypes = (*[ADDRESS] * 4, COUNT, COUNT, REAL, ADDRESS, ctypes.c_int)
    library.silu_mul.argtypes = (ADDRESS, ADDRESS, COUNT, COUNT, ADDRESS, ctypes.c_int)
    library.attend_layer.argtypes = (ctypes.POINTER(StepArgs),)
    library.grouped_linear.argtypes = (ctypes.POINTER(GroupedArgs), ADDRESS, ctypes.c_int)
    library.panel_linear.argtypes = (ctypes.POINTER(PanelArgs), ADDRESS, ctypes.c_int)
    library.run_decoder.argtypes = (ADDRESS, ADDRESS)
    library.choose_tokens.argtypes = (ADDRESS, ADDRESS, ctypes.c_int)
    library.team_open.argtypes = (ctypes.c_int,)
    for function in (library.team_call, library.team_dismiss, library.team_close):
        function.argtypes = (ADDRESS,)
    for name in NAMES:
        getattr(library, name).restype = None
    library.team_open.restype, library.panel_width.restype = ADDRESS, COUNT
    return library
