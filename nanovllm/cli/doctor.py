"""`nanovllm doctor`: what this machine has, what is wrong with it, and how to mend it.

What it is: the verb and its table. The checks themselves are `checks.py`. What it
knows nothing about: how a check works. Invariant: the exit code is 1 exactly when a
check found the engine unusable; advice alone does not fail.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from nanovllm.cli.terminal import note

if TYPE_CHECKING:
    from nanovllm.cli.checks import Check

_MARKS = {"ok": ("ok", "green"), "advice": ("advice", "yellow"), "failed": ("FAILED", "bold red")}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Look at versions, processor, memory and model, and run a self-test of a few seconds.

    Each problem comes with one sentence and its fix.
    """
    from nanovllm.cli import checks

    if sys.stderr.isatty():
        note("Looking at the machine and running the self-test ...")
    found = checks.all_checks()
    if as_json:
        is_fine = not any(check.state == "failed" for check in found)
        print(json.dumps({"ok": is_fine, "checks": [asdict(check) for check in found]}))
    else:
        _print_table(found)
    if any(check.state == "failed" for check in found):
        raise typer.Exit(1)


def _print_table(found: list[Check]) -> None:
    """One row a check, then one sentence and its fix for each problem."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in found:
        mark, style = _MARKS[check.state]
        table.add_row(f"[{style}]{mark}[/]", check.name, escape(check.value))
    console.print(table)
    problems = [check for check in found if check.problem]
    for check in problems:
        console.print(f"\n{escape(check.problem or '')}\n  Fix: {escape(check.fix or '')}", soft_wrap=True)
    if not problems:
        console.print("\nEverything is as it should be.")
