"""A pseudo-terminal's side of a conversation."""

from __future__ import annotations

import os


def read_until(terminal: int, wanted: bytes, more: int = 0) -> bytes:
    """What the terminal shows up to `wanted`, or at least `more` bytes."""
    seen = b""
    while wanted not in seen or len(seen) < more:
        seen += os.read(terminal, 4096)
    return seen
