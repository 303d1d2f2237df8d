"""submission.md: the sheet's template, empty or with a run's figures in it.

What it is: the six parts 12.1 to 12.6 and the analysis, in either language, from one list.
What it knows nothing about: rules of submission. Invariants: headings keep the sheet's
numbers in both languages, so that `submission.py` finds the parts; whatever a program wrote as prose bears
the draft mark, which has to go before the text can be handed in; figures bear none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.lab.experiment_4.cases import CASES
from nanovllm.lab.experiment_4.cells import as_markdown, cells_header, markdown_row
from nanovllm.lab.experiment_4.tables import COLUMNS
from nanovllm.lab.wording import say
from nanovllm.observe.wording import Lang

DRAFT_MARKS = ("【草稿】", "[DRAFT]")
IDENTITY = ("name", "student_id", "date", "environment")
LIFECYCLE = ("prefill", "decode", "release", "binding")
EXTENSION = ("choice", "where", "conclusion")
STATEMENT = ("observation", "real", "not_yet")


@dataclass(frozen=True)
class Filled:
    """What a run puts into the template."""

    date: str
    environment: str
    basis: dict[str, str]  # of each lifecycle event: the records that tell of it
    rows: Sequence[dict[str, Any]]  # of the capacity table
    explanations: Sequence[str]
    chain: str
    statement: dict[str, str] = field(default_factory=dict)


def draft(lang: Lang, text: str) -> str:
    """`text` with the mark of what no person has written."""
    return f"{DRAFT_MARKS[0] if lang == 'zh' else DRAFT_MARKS[1]} {text}"


def render(lang: Lang, filled: Filled | None = None) -> str:
    """The whole file; without `filled` every cell is the student's."""
    parts = [
        f"# {say(lang, 'submission_title')}\n\n{say(lang, 'submission_how')}\n",
        _part(lang, 1, _pairs(lang, "identity", IDENTITY, _identity(filled))),
        _part(lang, 2, _lifecycle(lang, filled)),
        _part(lang, 3, _capacity(filled)),
        _part(lang, 4, (draft(lang, filled.chain) if filled else say(lang, "chain_begin")) + "\n"),
        _part(lang, 5, _pairs(lang, "extension", EXTENSION, {"choice": say(lang, "extension_choices")})),
        _part(lang, 6, _pairs(lang, "statement", STATEMENT, _statement(lang, filled))),
        f"## {say(lang, 'analysis_title')}\n\n{say(lang, 'analysis_how')}\n",
    ]
    return "\n".join(parts)


def _part(lang: Lang, number: int, body: str) -> str:
    return f"## 12.{number} {say(lang, f'part_{number}')}\n\n{body}"


def _pairs(lang: Lang, part: str, names: Sequence[str], values: dict[str, str]) -> str:
    head = [markdown_row([say(lang, "item"), say(lang, "content")]), "|---|---|"]
    return "\n".join([*head, *(markdown_row([say(lang, f"{part}_{n}"), values.get(n, "")]) for n in names)]) + "\n"


def _identity(filled: Filled | None) -> dict[str, str]:
    return {} if filled is None else {"date": filled.date, "environment": filled.environment}


def _lifecycle(lang: Lang, filled: Filled | None) -> str:
    head = [say(lang, f"lifecycle_{name}_column") for name in ("event", "object", "basis")]
    lines = [markdown_row(head), "|---|---|---|"]
    for name in LIFECYCLE:
        basis = draft(lang, filled.basis[name]) if filled else ""
        lines.append(markdown_row([say(lang, f"lifecycle_{name}"), "", basis]))
    return "\n".join(lines) + "\n"


def _capacity(filled: Filled | None) -> str:
    if filled is not None:
        return as_markdown(filled.rows, filled.explanations)
    empty = [markdown_row([case, *[""] * (len(COLUMNS) - 1)]) for case in CASES]
    return "\n".join([*cells_header(), *empty]) + "\n"


def _statement(lang: Lang, filled: Filled | None) -> dict[str, str]:
    return {} if filled is None else {name: draft(lang, text) for name, text in filled.statement.items()}
