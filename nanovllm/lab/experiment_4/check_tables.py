"""The figures of a bundle: each computed again from the raw logs, each with its label and its bound.

What it is: rules cell, columns, label, bound, relation, wall, chain, statement, probe, over
tables.json and results.csv. What it knows nothing about: the manifest, a student's text.
Invariants: what a figure has to be comes from `tables.py` over the raw logs alone; a difference is reported
under the rule that it breaks, and never twice.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from nanovllm.lab.bundle import RESULTS, TABLES
from nanovllm.lab.experiment_4.cells import FIGURE_COLUMNS, cells
from nanovllm.lab.experiment_4.chain import NOT_TESTED
from nanovllm.lab.experiment_4.claims import gains_of_a_probe
from nanovllm.lab.experiment_4.tables import COLUMNS
from nanovllm.lab.findings import Finding, differences
from nanovllm.observe.probe import LABEL

PLACES = (  # where in tables.json a difference breaks which rule; the first that fits
    (re.compile(r"^columns"), "columns"),
    (re.compile(r"^statement\.real_effect"), "probe"),
    (re.compile(r"^probe\..*\.(label|statement)$"), "probe"),
    (re.compile(r"^statement"), "statement"),
    (re.compile(r"(^|\.)label$"), "label"),
    (re.compile(r"^chain"), "chain"),
    (re.compile(r"bound|counted_error_blocks|formula"), "bound"),
)


def check_tables(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Finding]:
    """tables.json against what the raw logs give."""
    ours = {key: value for key, value in found.items() if key != "observer"}
    for path, value, right in differences(ours, {k: v for k, v in wanted.items() if k != "observer"}):
        yield Finding(_rule(path, value), f"{TABLES} {path}", _short(value), _short(right))
    yield from _relations(found)
    if wanted["chain"]["verdict"] == NOT_TESTED:
        sides = [wanted["chain"]["interventions"][1]["small_pool"], wanted["chain"]["reverse"]["small_pool"]]
        least = min(sides, key=lambda side: int(side["pool_waits"]))
        yield Finding("wall", f"{TABLES} chain, arm {least['arm']}", str(least["pool_waits"]))


def _rule(path: str, value: Any) -> str:
    rule = next((rule for pattern, rule in PLACES if pattern.search(path)), "cell")
    if rule == "probe" and path.startswith("statement") and "probe" not in str(value):
        return "statement"
    return rule


def _relations(tables: dict[str, Any]) -> Iterator[Finding]:
    """A part is never more than its whole."""
    rows = tables.get("capacity_table")
    for row in rows if isinstance(rows, list) else []:
        for name in ("p50", "p99"):
            try:
                ttft, queue = row["TTFT"][name], row["queue_wait"][name]
                is_sound = ttft >= queue
            except (KeyError, TypeError):
                continue  # found as a missing cell
            if not is_sound:
                yield Finding("relation", f"{TABLES} {row.get('case')} {name}", str(ttft), str(queue))


def check_results(text: str, wanted: dict[str, Any]) -> Iterator[Finding]:
    """results.csv: the sheet's columns, and every cell but the explanation."""
    rows = list(csv.reader(io.StringIO(text)))
    header = tuple(rows[0]) if rows else ()
    if header != COLUMNS:
        yield Finding("columns", RESULTS, ", ".join(header), ", ".join(COLUMNS))
        return
    right = [cells(row) for row in wanted["capacity_table"]]
    if len(rows) - 1 != len(right):
        yield Finding("cell", RESULTS, f"{len(rows) - 1} rows", f"{len(right)} rows")
    yield from compare_cells(RESULTS, [row[:-1] for row in rows[1:]], right)


def compare_cells(where: str, found: list[list[str]], wanted: list[list[str]]) -> Iterator[Finding]:
    """Rows of figure cells, column by column."""
    for ours, right in zip(found, wanted):
        for column, value, wants in zip(FIGURE_COLUMNS, [*ours, *[""] * len(right)], right):
            if value.strip() != wants:
                yield Finding("cell", f"{where} {right[0]} {column}", value, wants)


def check_claims(where: str, text: str) -> Iterator[Finding]:
    """No sentence makes a gain of what a probe saw."""
    stripped = re.sub(rf"\[{LABEL}: [^\]]*\]", "", text)
    return (Finding("probe", where, _short(sentence)) for sentence in gains_of_a_probe(stripped))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
