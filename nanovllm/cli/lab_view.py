"""What `nanovllm lab` prints.

What it is: the capacity table and the verdict of a check as lines. What it knows nothing
about: how either came about. Invariant: every figure is printed with its label.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.lab.findings import Verdict
from nanovllm.observe.wording import Lang


def print_tables(tables: dict[str, Any], out: Path, lang: Lang) -> None:
    """The table, the chain and where the bundle lies."""
    print(out, tables["chain"]["verdict"])


def print_verdict(verdict: Verdict, lang: Lang) -> None:
    """Each rule with its mark, and what was found."""
    for rule in verdict.rules:
        print(f"{'✘' if rule in verdict.broken() else '✔'} {rule}")
    for finding in verdict.findings:
        print(f"  {finding.rule}: {finding.text(lang)}")
