"""S8 on a real file system: a tmpfs that is full to 50, 95, 99 and 100 %, and then read-only. No shim."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOUNT = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"']


def can_mount(folder: Path) -> bool:
    return shutil.which("unshare") is not None and not subprocess.run([*MOUNT, folder, "true"], check=False).returncode


def test_a_full_and_a_read_only_file_system_lose_nothing(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own")
    child = [sys.executable, "-m", "tests.state.small_disk_child", tmp_path]
    done = subprocess.run([*MOUNT, tmp_path, *child], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen["refused"]) == {"50", "95", "99", "100"} and "Read-only file system" in seen["read_only"]
