"""Manifests: what a bundle's files are, and whether they still are what they were.

What it is: SHA-256 of every file and of the manifest itself, in both directions. What it
knows nothing about: what the files mean. Invariants: a manifest names every file of its
folder but itself; a change of any byte is found, in the manifest too. This tells an
accident or an edit, not a forger: whoever can write the folder can seal it again, and is
then up against the recordings, from which every figure is computed anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from nanovllm.errors import BundleError
from nanovllm.lab.findings import Finding

NAME = "manifest.json"
MAX_BYTES = 2**22
MAX_FILES = 1000


def seal(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """`document` with the digests of the files in `folder`, and its own."""
    files = {path.relative_to(folder).as_posix(): file_facts(path) for path in files_of(folder)}
    whole = {**document, "files": files}
    return {**whole, "sha256": own_digest(whole)}


def write_manifest(folder: Path, document: dict[str, Any]) -> None:
    """Replaces the manifest in one move."""
    partial = folder / f".{NAME}.partial"
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(folder / NAME)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle. Raises BundleError where there is none that can be read."""
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BundleError(f"{path} is longer than {MAX_BYTES:,} bytes.", param="bundle")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "A bundle is a folder made by nanovllm lab run."
        raise BundleError(f"{path} cannot be read: {error.strerror or error}.", param="bundle", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON.", param="bundle") from error
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        raise BundleError(f"{path} is no manifest.", param="bundle")
    return document


def own_digest(document: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest, in canonical JSON."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """Digest and length of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def files_of(folder: Path) -> Iterator[Path]:
    """Every file under `folder` but the manifest, in order. Raises BundleError where there are too many."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, f".{NAME}.partial"))
    if len(found) > MAX_FILES:
        raise BundleError(f"{folder} holds more than {MAX_FILES:,} files: this is no bundle.", param="bundle")
    yield from found


def check_files(folder: Path, document: dict[str, Any], free: Collection[str]) -> Iterator[Finding]:
    """What is no longer as it was sealed: the manifest, and every file but those whose text may change."""
    if own_digest(document) != document.get("sha256"):
        yield Finding("manifest", NAME, "another text", "the one that was sealed")
    present = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    for name, facts in document["files"].items():
        if name not in present:
            yield Finding("file", name, "missing", "in the bundle")
        elif name not in free and (not isinstance(facts, dict) or file_facts(present[name]) != facts):
            yield Finding("file", name, "changed", "as it was sealed")
    yield from (
        Finding("file", name, "not in the manifest", "nothing else") for name in present.keys() - document["files"]
    )
