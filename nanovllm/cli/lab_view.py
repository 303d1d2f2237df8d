"""What `nanovllm lab` prints.

What it is: the capacity table and the verdict of a check as lines. What it knows nothing
about: how either came about. Invariant: every figure is printed with its label.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanovllm.lab.experiment_4.cells import FIGURE_COLUMNS, cells
from nanovllm.lab.findings import Verdict
from nanovllm.lab.wording import say
from nanovllm.observe.wording import Lang

MARKS = MappingProxyType({True: "✔", False: "✘", None: "–"})


def print_tables(tables: dict[str, Any], out: Path, lang: Lang) -> None:
    """The table, a case at a time, the chain, and where the bundle lies."""
    width = max(map(len, FIGURE_COLUMNS))
    for row in tables["capacity_table"]:
        for column, cell in zip(FIGURE_COLUMNS, cells(row)):
            label = "" if column == "case" else f"  [{row[column]['label']}]"
            print(f"{column:{width}}  {cell}{label}")
        print()
    print(say(lang, "run_done", out=out, verdict=tables["chain"]["verdict"]))
    print(say(lang, "run_next", out=out))


def print_verdict(verdict: Verdict, lang: Lang) -> None:
    """The checklist, and below it what was found."""
    for rule, holds in verdict.outcomes().items():
        remark = f" ({say(lang, 'not_evaluated')})" if holds is None else ""
        print(f"{MARKS[holds]} {rule:15} {say(lang, f'list_{rule}')}{remark}")
    print()
    for finding in verdict.findings:
        print(f"[{finding.rule}] {finding.text(lang)}")
    key = "check_pass" if verdict.is_pass else "check_fail"
    print(say(lang, key, bundle=verdict.bundle, count=len(verdict.findings)))
