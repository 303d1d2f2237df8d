"""Reading JSON files that nobody vouches for.

What it is: bounded reading that returns an object or raises ModelFileError. What it
knows nothing about: what the object means. Invariant: no parser exception escapes,
and no file over the cap is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelFileError

MAX_JSON_BYTES = 64 * 2**20


def read_json(file: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in `file`; `missing`, if given, is returned where there is no such file."""
    try:
        if missing is not None and not file.exists():
            return missing
        if file.stat().st_size > MAX_JSON_BYTES:
            raise _bad(file, f"it exceeds {MAX_JSON_BYTES} bytes")
        return strict_loads(file.read_bytes(), file)
    except OSError as error:
        raise _bad(file, error.strerror or "it cannot be read") from error


def strict_loads(data: bytes, file: Path) -> dict[str, Any]:
    """Parse `data`, which came from `file`; only an object with distinct keys is accepted."""
    try:
        value = json.loads(data, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _bad(file, str(error)[:200] or "it is nested too deeply") from error
    if not isinstance(value, dict):
        raise _bad(file, "it does not hold an object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two values under one key mean two readers may disagree; refuse instead of choosing."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _bad(file: Path, problem: str) -> ModelFileError:
    return ModelFileError(f"{file.name} is not readable JSON: {problem}.", param=str(file), hint="Download it again.")
