"""Where and with what code a lab ran: facts for a manifest.

What it is: what the machine and the checkout say about themselves. What it knows nothing
about: experiments. Invariants: no path, user or host name is told; what cannot be found out
is None and never a guess.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from nanovllm import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "numba")


def now() -> str:
    """The wall clock in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def load_average() -> list[float]:
    """Mean number of runnable tasks over 1, 5 and 15 minutes: above the number of CPUs others were at work too."""
    return [round(value, 2) for value in psutil.getloadavg()]


def environment() -> dict[str, Any]:
    """The machine and the interpreter."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "logical_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: _version(name) for name in PACKAGES},
        "load_average_before": load_average(),
    }


def code_facts() -> dict[str, Any]:
    """Version, commit, and whether tracked files differ from it; None where this is no checkout."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"version": __version__, "commit": commit or None, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    done = subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
