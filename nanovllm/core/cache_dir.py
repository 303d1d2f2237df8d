"""Where files are kept that can be fetched or made again.

What it is: one path. What it knows nothing about: what lies there.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$NANOVLLM_CACHE, else nanovllm/ in the XDG cache. It may not exist yet."""
    if own := os.environ.get("NANOVLLM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nanovllm"
