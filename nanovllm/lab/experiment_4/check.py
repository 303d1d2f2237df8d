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
from nanovllm.lab.bundle import DIAGRAMS, NOTES, PROSE, README, RESULTS, SUBMISSION, TABLES
from nanovllm.lab.experiment_4 import check_raw, submission
from nanovllm.lab.experiment_4.check_tables import check_claims, check_results, check_tables
from nanovllm.lab.experiment_4.reference import compare
from nanovllm.lab.experiment_4.report import LIFECYCLE
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
    "diagram",
    "observer",
)
MAX_TEXT_BYTES = 2**22


def check_bundle(folder: Path, *, handed_in: bool = False) -> Verdict:
    """Everything that can be held against a bundle. Raises BundleError where there is none to be read."""
    manifest = read_manifest(folder)
    verdict = Verdict(EXPERIMENT, folder.name, RULES)
    if manifest.get("experiment") != EXPERIMENT:
        raise BundleError(f"{folder} is no bundle of experiment 4.", param="bundle")
    verdict.findings += check_files(folder, manifest, PROSE)
    if manifest.get("status") != "ok":
        told = manifest.get("error")
        verdict.findings.append(Finding("status", "manifest.json", f"{manifest.get('status')} ({told})", "ok"))
        return verdict
    recorded = _raw(folder, manifest, verdict)
    _figures(folder, manifest, recorded, verdict)
    for name in (README, RESULTS, NOTES, SUBMISSION):
        verdict.findings += check_claims(name, _text(folder, name, verdict))
    if not (folder / DIAGRAMS / f"{LIFECYCLE}.svg").is_file():
        verdict.findings.append(Finding("diagram", DIAGRAMS))
    if handed_in:
        _submission(folder, recorded, manifest, verdict)
    return verdict


def _raw(folder: Path, manifest: dict[str, Any], verdict: Verdict) -> list[RecordedRun]:
    """The recordings; those that can be read, where some cannot."""
    runs = check_raw.planned_runs(manifest)
    seed = manifest.get("seed")
    verdict.findings += check_raw.check_plan(manifest, runs)
    recorded, unreadable = check_raw.read_all(folder, runs)
    verdict.findings += unreadable
    for run in recorded:
        verdict.findings += check_raw.check_run(run, check_raw.size_of(manifest), seed if isinstance(seed, int) else 0)
    verdict.findings += check_raw.check_headers(manifest, recorded)
    return recorded


def _figures(folder: Path, manifest: dict[str, Any], recorded: list[RecordedRun], verdict: Verdict) -> None:
    """Tables against the recordings, where there are enough of these to compute any."""
    tables, wanted = _tables(folder, verdict), _computed(recorded, manifest)
    results = _text(folder, RESULTS, verdict)
    if wanted is None:
        if not verdict.broken() & {"raw", "repeats"}:
            verdict.findings.append(Finding("raw", "raw", "nothing can be computed from it"))
        return
    verdict.findings += check_tables(tables, wanted)
    verdict.findings += check_results(results, wanted)
    if isinstance(observer := tables.get("observer"), dict):
        verdict.findings += compare(observer, recorded)


def _submission(folder: Path, recorded: list[RecordedRun], manifest: dict[str, Any], verdict: Verdict) -> None:
    wanted = _computed(recorded, manifest)
    rows = [] if wanted is None else wanted["capacity_table"]
    observer = _tables(folder, verdict).get("observer")
    verdict.rules = (*verdict.rules, *submission.RULES)
    verdict.findings += submission.check(_text(folder, SUBMISSION, verdict), rows, observer, folder)


def _computed(recorded: list[RecordedRun], manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What the raw logs give; None where they give nothing whole."""
    try:
        return make_tables(recorded, check_raw.size_of(manifest))
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
