"""`lab check 4`: a bundle held against its own raw logs, and against the rules of the sheet.

What it is: the rules in their order. What it knows nothing about: how a verdict is shown.
Invariants: nothing of the bundle is changed and no code in it is run; each finding names the
rule it breaks; a bundle that is broken in one place is still checked in all others; files are
read within bounds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import BundleError
from nanovllm.lab.bundle import NOTES, PROSE, README, RESULTS, SUBMISSION, TABLES
from nanovllm.lab.experiment_4 import check_manifest, check_raw, submission
from nanovllm.lab.experiment_4.cases import size_of
from nanovllm.lab.experiment_4.check_tables import check_claims, check_results, check_tables
from nanovllm.lab.experiment_4.check_texts import check_diagrams, check_prose
from nanovllm.lab.experiment_4.reference import check_source, compare
from nanovllm.lab.experiment_4.report import texts
from nanovllm.lab.experiment_4.tables import RecordedRun, make_tables
from nanovllm.lab.findings import Finding, Verdict
from nanovllm.lab.manifest import check_files, read_manifest

EXPERIMENT = 4
RULES = (
    "manifest",
    "status",
    "file",
    "raw",
    "repeats",
    "order",
    "pool",
    "cell",
    "columns",
    "label",
    "bound",
    "relation",
    "wall",
    "chain",
    "statement",
    "probe",
    "generated",
    "diagram",
    "observer",
)
OF_FIGURES = frozenset({"cell", "columns", "label", "bound", "relation", "wall", "chain", "statement", "observer"})
MAX_TEXT_BYTES = 2**22


def check_bundle(folder: Path, *, handed_in: bool = False) -> Verdict:
    """Everything that can be held against a bundle. Raises BundleError where there is none to be read."""
    manifest = read_manifest(folder)
    verdict = Verdict(EXPERIMENT, folder.name, (*RULES, *(submission.RULES if handed_in else ())))
    if manifest.get("experiment") != EXPERIMENT:
        raise BundleError(f"{folder} is no bundle of experiment 4.", param="bundle")
    verdict.findings += check_files(folder, manifest, PROSE)
    if manifest.get("status") != "ok":
        told = manifest.get("error")
        verdict.findings.append(Finding("status", "manifest.json", f"{manifest.get('status')} ({told})", "ok"))
        verdict.skipped |= set(verdict.rules) - {"status", "file"}
        return verdict
    recorded = _raw(folder, manifest, verdict)
    tables, wanted = _tables(folder, verdict), _computed(recorded, manifest)
    made = _made(wanted, recorded, manifest)
    _figures(folder, tables, wanted, recorded, verdict)
    _texts(folder, manifest, wanted, made, verdict)
    for name in (README, RESULTS, NOTES, SUBMISSION):
        verdict.findings += check_claims(name, _text(folder, name, verdict))
    if handed_in:
        rows = [] if wanted is None else wanted["capacity_table"]
        drafts = made.get(SUBMISSION, "")
        text = _text(folder, SUBMISSION, verdict)
        verdict.findings += submission.check(text, drafts, rows, tables.get("observer"), folder)
    return verdict


def _raw(folder: Path, manifest: dict[str, Any], verdict: Verdict) -> list[RecordedRun]:
    """The recordings; those that can be read, where some cannot."""
    runs = check_raw.planned_runs(manifest)
    size, seed = size_of(manifest), manifest.get("seed")
    shape = list(check_manifest.check_shape(manifest, runs))
    verdict.findings += [*shape, *check_raw.check_plan(runs)]
    recorded, unreadable = check_raw.read_all(folder, runs)
    verdict.findings += unreadable
    for run in recorded:
        verdict.findings += check_raw.check_run(folder, run, size, seed if isinstance(seed, int) else 0)
    verdict.findings += check_raw.check_sequence(recorded)
    if recorded and not shape:
        verdict.findings += check_manifest.check_recorded(manifest, recorded)
    return recorded


def _figures(
    folder: Path, tables: dict[str, Any], wanted: dict[str, Any] | None, recorded: list[RecordedRun], verdict: Verdict
) -> None:
    """Tables against the recordings, where there are enough of these to compute any."""
    results, observer = _text(folder, RESULTS, verdict), tables.get("observer")
    if wanted is None:
        verdict.skipped |= OF_FIGURES
        if not verdict.broken() & {"raw", "repeats"}:
            verdict.findings.append(Finding("raw", "raw", "nothing can be computed from it"))
        return
    verdict.findings += check_tables(tables, wanted)
    verdict.findings += check_results(results, wanted)
    if observer is None:
        verdict.skipped.add("observer")
    elif not isinstance(observer, dict):
        verdict.findings.append(Finding("observer", f"{TABLES} observer", str(observer), "reports"))
    else:
        verdict.findings += [*check_source(folder, observer), *compare(observer, recorded)]


def _texts(
    folder: Path, manifest: dict[str, Any], wanted: dict[str, Any] | None, made: dict[str, str], verdict: Verdict
) -> None:
    """What a program wrote for people, where it can be made again."""
    if wanted is None or not made:
        verdict.skipped |= {"generated", "diagram"}
        return
    verdict.findings += check_prose({name: _text(folder, name, verdict) for name in (README, RESULTS)}, made)
    verdict.findings += check_diagrams(folder, manifest, made, wanted)


def _made(wanted: dict[str, Any] | None, recorded: list[RecordedRun], manifest: dict[str, Any]) -> dict[str, str]:
    """The texts again; none where the raw logs or the manifest's facts do not suffice, which other rules have told."""
    runs = check_raw.planned_runs(manifest)
    if wanted is None or list(check_manifest.check_shape(manifest, runs)):
        return {}
    try:
        return texts(wanted, recorded, manifest, manifest["lang"])
    except (IndexError, KeyError, ValueError, TypeError, StopIteration):
        return {}


def _computed(recorded: list[RecordedRun], manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What the raw logs give; None where they give nothing whole."""
    try:
        return make_tables(recorded, size_of(manifest))
    except (IndexError, KeyError, ValueError, TypeError, ZeroDivisionError):
        return None  # a run is missing, or none of its requests came to a token: told by rule raw or repeats


def _tables(folder: Path, verdict: Verdict) -> dict[str, Any]:
    try:
        document = json.loads(_text(folder, TABLES, verdict))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        verdict.findings.append(Finding("cell", TABLES, "no JSON object", "the tables"))
        return {}
    return document


def _text(folder: Path, name: str, verdict: Verdict) -> str:
    """One text file of the bundle; a finding, once, where it cannot be read."""
    try:
        with (folder / name).open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError
        return data.decode("utf-8")
    except (OSError, ValueError):
        finding = Finding("file", name, "missing or unreadable", "a text file")
        verdict.findings += [] if finding in verdict.findings else [finding]
        return ""
