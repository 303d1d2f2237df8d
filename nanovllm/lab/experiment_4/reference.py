"""What a student's observer ought to have reported: the same figures, computed here.

What it is: the reference counter and probe, from recordings and traces. What it knows
nothing about: the student's code, which a check reads and never runs. Invariants: a figure that the reference
does not have is a finding, and of each kind some must be there; integers are compared exactly, means within
one part in a thousand.

    state_counter   live_requests_max, live_requests_mean, used_blocks_max, requests, prompt_tokens, output_tokens,
                    largest_request_blocks, largest_request_bytes
    prefix_probe    prompt_tokens, overlap_tokens, requests_with_overlap   (blocks of the run's block_size; the block
                    with the last prompt token never counts), label: observe-only; statement: the probe's own
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanovllm.lab.bundle import RAW
from nanovllm.lab.experiment_4.tables import RecordedRun
from nanovllm.lab.findings import MISSING, Finding
from nanovllm.observe.probe import LABEL, STATEMENT

NEEDED = {
    "state_counter": ("live_requests_max", "used_blocks_max"),
    "prefix_probe": ("prompt_tokens", "overlap_tokens"),
}
TOLERANCE = 1e-3
TABLE = "tables.json observer"
SOURCE = f"{RAW}/observer.py"
FIELDS = {"source", "name", "reports"}
MAX_SOURCE_BYTES = 2**20


def reference(kind: str, run: RecordedRun) -> dict[str, Any]:
    """Every figure that can be compared."""
    if kind == "prefix_probe":
        overlap = run.overlap
        names = {"prompt_tokens": "tokens", "overlap_tokens": "overlap_tokens", "requests_with_overlap": None}
        return {
            "label": LABEL,
            "statement": STATEMENT,
            **{ours: overlap[theirs or ours] for ours, theirs in names.items()},
        }
    figures, paths = run.figures, run.replay.paths.values()
    largest = max(figures["state_sizes"], key=lambda size: int(size["blocks"]))
    return {
        "live_requests_max": figures["live_requests"]["max"],
        "live_requests_mean": figures["live_requests"]["mean"],
        "used_blocks_max": figures["used_blocks"]["max"],
        "requests": figures["requests"],
        "prompt_tokens": sum(path.prompt_len for path in paths),
        "output_tokens": sum(len(path.timeline.token_ns) for path in paths),
        "largest_request_blocks": largest["blocks"],
        "largest_request_bytes": largest["block_exact_bytes"],
    }


def check_source(folder: Path, observer: Mapping[str, Any]) -> Iterator[Finding]:
    """Reports come from a source that lies in the bundle, under its digest, and defines what they say they are of."""
    if set(observer) != FIELDS or observer.get("source") != SOURCE:
        yield Finding("observer", TABLE, ", ".join(sorted(map(str, observer))), f"source ({SOURCE}), name, reports")
    try:
        with (folder / SOURCE).open("rb") as file:
            defined = {name for node in ast.parse(file.read(MAX_SOURCE_BYTES)).body for name in names_of(node)}
    except (OSError, SyntaxError, ValueError, RecursionError):
        yield Finding("observer", SOURCE, "no source", "the observer that reported")
        return
    if observer.get("name") not in defined:
        yield Finding("observer", SOURCE, f"no {observer.get('name')}", "the observer that reported")


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines: a class, a function, assigned or annotated names."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def compare(observer: Mapping[str, Any], recorded: list[RecordedRun]) -> Iterator[Finding]:
    """What of an observer's reports differs from the reference, run by run."""
    reports = observer.get("reports")
    if not isinstance(reports, dict):
        yield Finding("observer", TABLE, "no reports", "one a run")
        return
    names = {run.planned.name for run in recorded}
    yield from (
        Finding("observer", f"{TABLE}.reports.{one}", "no such run", "-") for one in reports if one not in names
    )
    for run in recorded:
        report = reports.get(run.planned.name)
        kind = report.get("kind") if isinstance(report, dict) else None
        where = f"{TABLE}.reports.{run.planned.name}"
        if not isinstance(report, dict) or kind not in NEEDED:
            yield Finding("observer", where, str(kind), " | ".join(NEEDED))
        else:
            yield from _compare_report(where, report, reference(kind, run), NEEDED[kind])


def _compare_report(
    where: str, report: Mapping[str, Any], wanted: Mapping[str, Any], needed: tuple[str, ...]
) -> Iterator[Finding]:
    must = (*needed, *(["label"] if "label" in wanted else []))
    for name, value in wanted.items():
        found = report.get(name, MISSING)
        if found == MISSING and name not in must:
            continue
        if not _agree(found, value):
            yield Finding("observer", f"{where}.{name}", str(found), str(value))
    for name in report.keys() - wanted.keys() - {"kind"}:
        yield Finding("observer", f"{where}.{name}", str(report[name]), "no figure that can be compared")


def _agree(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=1e-9)
    return bool(found == wanted) and isinstance(found, bool) == isinstance(wanted, bool)
