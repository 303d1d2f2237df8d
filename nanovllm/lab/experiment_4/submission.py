"""submission.md held to what the sheet asks of a student.

What it is: the seven parts taken out of the text, and a rule or two for each. What it knows
nothing about: bundles' figures beyond the table it is given. Invariants: parts are found by
the sheet's numbers, rows by their place, so that either language will do; what is asked for is that a person
wrote something and tied state to concurrency and waiting; whether it is right, a person judges.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nanovllm
from nanovllm.lab.bundle import SUBMISSION
from nanovllm.lab.experiment_4.analysis import check_analysis
from nanovllm.lab.experiment_4.cells import cells
from nanovllm.lab.experiment_4.check_tables import compare_cells
from nanovllm.lab.experiment_4.claims import speaks_of_a_probe
from nanovllm.lab.experiment_4.reference import names_of
from nanovllm.lab.experiment_4.template import DRAFT_MARKS, EXTENSION, IDENTITY, LIFECYCLE, STATEMENT
from nanovllm.lab.findings import Finding

RULES = (
    "identity",
    "lifecycle",
    "explanation",
    "chain_text",
    "extension",
    "probe_statement",
    "result",
    "analysis",
    "figures",
    "scope",
    "draft",
)
SOURCE = Path(nanovllm.__file__).resolve().parent  # tests, sheets and scripts hold no state
ANALYSIS = "analysis"
HEADING = re.compile(r"^## +(12\.\d|Analysis|分析)", re.M)
COMMENT = re.compile(r"<!--.*?-->", re.S)
SYMBOL = re.compile(r"([\w./-]+\.py)::([A-Za-z_][\w.]*)")
KINDS = {"state_counter": re.compile(r"统计器|counter", re.I), "prefix_probe": re.compile(r"探针|probe", re.I)}
ADMITS = (
    re.compile(r"潜在重叠|potential[- ]overlap", re.I),
    re.compile(r"不是[^。|\n]*收益|not a realised|no realised", re.I),
)
NO_WORD = re.compile(r"[\W_]+")
PERSON = {  # what each field has at the least
    "name": re.compile(r"([^\W\d_]).*(?!\1)[^\W\d_]"),
    "student_id": re.compile(r"\d.*\d|\d.*[^\W_]{2}|[^\W_]{2}.*\d"),
    "date": re.compile(r"\d{4}.*\d{1,2}.*\d{1,2}"),
    "environment": re.compile(r"[^\W\d_]{3}"),
}
MUCH_THE_SAME = 1.3
MIN_ARROWS = 3


def check(text: str, drafts: str, rows: Sequence[dict[str, Any]], observer: Any, folder: Path) -> Iterator[Finding]:
    """Every rule that the text breaks. `drafts` is what the run wrote, `rows` are those of the capacity table."""
    parts = parts_of(text)
    yield from _empty(parts, "12.1", IDENTITY, "identity")
    yield from _identity(table(parts.get("12.1", "")))
    yield from _lifecycle(parts, folder)
    yield from _capacity(parts, rows)
    if (arrows := len(re.findall(r"->|→", parts.get("12.4", "")))) < MIN_ARROWS:
        yield Finding("chain_text", _at("12.4"), str(arrows), str(MIN_ARROWS))
    yield from _extension(parts, observer)
    yield from _empty(parts, "12.6", STATEMENT, "result")
    yield from _real_gain(parts)
    yield from check_analysis(_at(ANALYSIS), parts.get(ANALYSIS, ""), rows)
    yield from _unchanged(parts, parts_of(drafts))
    for mark in DRAFT_MARKS:
        if mark in text:
            yield Finding("draft", SUBMISSION, f"{text.count(mark)} x {mark}")


def parts_of(text: str) -> dict[str, str]:
    """The parts by number, and the analysis; comments left out."""
    text = COMMENT.sub("", text)
    found = list(HEADING.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    parts = {}
    for match, end in zip(found, ends):
        name = match[1] if match[1].startswith("12") else ANALYSIS
        parts[name] = text[match.start() : end].partition("\n")[2].strip()
    return parts


def table(part: str) -> list[list[str]]:
    """The rows of the first table of a part, without its head."""
    rows = [line.strip().strip("|").split("|") for line in part.splitlines() if line.strip().startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def _at(part: str) -> str:
    return f"{SUBMISSION} {part}"


def _empty(parts: Mapping[str, str], part: str, names: Sequence[str], rule: str) -> Iterator[Finding]:
    """Rows of a two-column table that nobody filled in."""
    rows = table(parts.get(part, ""))
    for place, name in enumerate(names):
        if not "".join(rows[place][1:] if place < len(rows) else []).strip():
            yield Finding(rule, _at(part), name)


def _identity(rows: list[list[str]]) -> Iterator[Finding]:
    """What is no name, number or date."""
    for row, name in zip(rows, IDENTITY):
        value = "".join(row[1:]).strip()
        if value and not PERSON[name].search(value):
            yield Finding("identity", _at("12.1"), f"{name}: {value}")


def _unchanged(parts: Mapping[str, str], drafts: Mapping[str, str]) -> Iterator[Finding]:
    """Prose that the run wrote, with its mark gone and little else."""
    for part in ("12.2", "12.3", "12.4", "12.6"):
        theirs, written = _prose(parts.get(part, "")), _prose(drafts.get(part, ""))
        same = [
            ours
            for ours in written
            if any(ours and ours in one and len(one) < MUCH_THE_SAME * len(ours) for one in theirs)
        ]
        yield from (Finding("draft", _at(part), "why_unchanged", one[:60]) for one in same)


def _prose(part: str) -> list[str]:
    """The last cell of each row, or the text of a part without a table: letters and digits alone, no draft mark."""
    for mark in DRAFT_MARKS:
        part = part.replace(mark, "")
    return [NO_WORD.sub("", text) for text in ([row[-1] for row in table(part)] or [part])]


def _lifecycle(parts: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    rows = table(parts.get("12.2", ""))
    everywhere = set.intersection(*(set(SYMBOL.findall("".join(row[1:2]))) for row in rows)) if len(rows) > 1 else set()
    for file, symbol in sorted(everywhere):
        yield Finding("lifecycle", _at("12.2"), f"{file}::{symbol}", "why_one_symbol")
    for place, name in enumerate(LIFECYCLE):
        row = rows[place] if place < len(rows) else []
        if len(row) < 3 or not row[2]:
            yield Finding("lifecycle", f"{_at('12.2')} {name}", "why_no_basis")
            continue
        named = SYMBOL.findall(row[1])
        unknown = [f"{file}::{symbol}" for file, symbol in named if not has_symbol(file, symbol)]
        if not named:
            yield Finding("lifecycle", f"{_at('12.2')} {name}", "why_no_symbol")
        yield from (Finding("lifecycle", f"{_at('12.2')} {name}", one, "why_unknown_symbol") for one in unknown)


def has_symbol(file: str, symbol: str) -> bool:
    """Whether a file of the engine's source defines a class, function, method or annotated field of that name."""
    path = (SOURCE.parent / file).resolve()
    if not path.is_relative_to(SOURCE) or not path.is_file():
        return False
    try:
        level: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError, RecursionError):  # a student's file may be anything
        return False
    for name in symbol.split("."):
        node = next((node for node in level if name in names_of(node)), None)
        if node is None:
            return False
        level = list(node.body) if isinstance(node, ast.ClassDef) else []
    return True


def _capacity(parts: Mapping[str, str], rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    found = table(parts.get("12.3", ""))
    yield from compare_cells(_at("12.3"), [row[:-1] for row in found], [cells(row) for row in rows])
    if len(found) < len(rows):
        yield Finding("cell", _at("12.3"), f"{len(found)} rows", f"{len(rows)} rows")
    yield from (Finding("explanation", f"{_at('12.3')} {row[0]}") for row in found if not row[-1])


def _extension(parts: Mapping[str, str], observer: Any) -> Iterator[Finding]:
    """One of the two, implemented, run, and what it is said."""
    rows = table(parts.get("12.5", ""))
    values = [rows[place][-1] if place < len(rows) else "" for place in range(len(EXTENSION))]
    chosen = [kind for kind, word in KINDS.items() if word.search(values[0])]
    if len(chosen) != 1:
        yield Finding("extension", _at("12.5"), "why_choose")
    yield from (Finding("extension", _at("12.5"), "why_empty", n) for n, v in zip(EXTENSION, values) if not v)
    if not isinstance(observer, dict):
        yield Finding("extension", _at("12.5"), "why_no_observer")
    elif len(chosen) == 1 and (kinds := _kinds(observer)) != {chosen[0]}:
        yield Finding("extension", _at("12.5"), "why_other_kind", ", ".join(sorted(kinds)))
    whole = "\n".join(parts.values())
    if chosen == ["prefix_probe"] and not all(pattern.search(whole) for pattern in ADMITS):
        yield Finding("probe_statement", _at("12.5"))


def _kinds(observer: dict[str, Any]) -> set[str]:
    reports = observer.get("reports")
    return {str(one.get("kind")) for one in reports.values()} if isinstance(reports, dict) else {"nothing"}


def _real_gain(parts: Mapping[str, str]) -> Iterator[Finding]:
    """What stands under "real gain" is no probe's."""
    rows = table(parts.get("12.6", ""))
    text = rows[1][-1] if len(rows) > 1 else ""
    if speaks_of_a_probe(text):
        yield Finding("probe", f"{_at('12.6')} {STATEMENT[1]}", text)
