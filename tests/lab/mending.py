"""Bundles changed on purpose: edits of single places, and the seal put on again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.lab.experiment_4 import plots
from nanovllm.lab.experiment_4.cases import size_of
from nanovllm.lab.experiment_4.check_raw import planned_runs
from nanovllm.lab.experiment_4.report import texts
from nanovllm.lab.experiment_4.tables import make_tables, read_runs
from nanovllm.lab.manifest import read_manifest, seal, write_manifest


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON document in place."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def edit_text(path: Path, old: str, new: str) -> None:
    """Replace what must be there, once."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def edit_lines(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Each record of a raw log as `change` returns it; None drops the line."""
    records = [change(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps(record, separators=(",", ":")) for record in records if record is not None]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """What somebody does who knows the format: a manifest that fits the files."""
    manifest = read_manifest(folder)
    change(manifest)
    write_manifest(folder, seal(folder, {k: v for k, v in manifest.items() if k not in ("files", "sha256")}))


def rebuild(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """The same, with all that a program makes made again from the changed logs: only the rules can tell it now."""
    reseal(folder, change)
    manifest = read_manifest(folder)
    try:
        recorded = read_runs(folder, planned_runs(manifest))
    except InvalidRequestError:
        return  # a log that cannot be read gives nothing to make again
    tables = make_tables(recorded, size_of(manifest))
    (folder / "tables.json").write_text(json.dumps(tables), encoding="utf-8")
    for name, text in texts(tables, recorded, manifest, manifest["lang"]).items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in (plots.RESIDENCY, plots.CHAIN):  # no shape of a picture is compared, its words are
        shown = "".join(f"<text>{word}</text>" for word in plots.words(name, tables))
        (folder / "diagrams" / name).write_text(f"<svg><path/>{shown}</svg>", encoding="utf-8")
    reseal(folder)
