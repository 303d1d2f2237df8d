"""The command within this process, as the tests of the command line have it; the scripts for teachers importable."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cli.conftest import clean_env, nanovllm

__all__ = ["clean_env", "nanovllm"]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts/teaching"))
