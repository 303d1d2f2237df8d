"""What `nanovllm trace compare` and `diagnose` print for people.

What it is: two runs figure by figure, and a verdict with its evidence. What it knows nothing
about: how they were judged. Invariants: every figure carries its label; a named cause stands
with its records and with what would refute it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from nanovllm.cli.trace_view import make_console, number, print_remarks, print_table, safe
from nanovllm.observe.wording import Lang, say

NOT_TOLD = ("scheduled_ns",)  # of an event: for programs
LIMITS = {"batch_cap", "blocks_exhausted"}  # where both hold at once, neither can be refuted alone
SMALL = 0.001  # shares below are left out


def print_comparison(found: Mapping[str, Any], lang: Lang) -> None:
    """What ran, figure by figure, then what each spent its time on."""
    console = make_console()
    for name, command in zip("AB", found["commands"], strict=True):
        console.print(f"[bold]{name}[/] {safe(command)}")
    for name, (a, b) in found["differs"].items():
        console.print(f"[bold]{name:<23}[/] {safe(f'{a}  |  {b}')}")
    first, second = (f"{name} ({label})" for name, label in zip("AB", found["labels"], strict=True))
    rows = [
        [name, *(number(row[part]) for part in ("first", "second", "ratio"))] for name, row in found["figures"].items()
    ]
    print_table(console, ["figure", first, second, "B / A"], rows, "latencies in ms", left=("figure",))
    for name, run in zip("AB", found["diagnoses"], strict=True):
        causes = ", ".join(f"{cause} {share:.0%}" for cause, share in run["causes"].items())
        verdict = say(lang, "verdict_" + run["verdict"])
        console.print(f"[bold]{name}[/] ({run['label']}) {verdict}{': ' + causes if causes else ''}")
    if "prior_state" in found["differs"]:
        a, b = found["differs"]["prior_state"]
        console.print(say(lang, "cold_warm", first=a, second=b))
    print_remarks(console, found["remarks"])


def print_diagnosis(found: Mapping[str, Any], lang: Lang) -> None:
    """The verdict, then each cause that is named with its evidence, then the other shares."""
    console, label = make_console(), found["label"]
    request = found["scope"]["request"]
    scope = say(lang, "scope_run", requests=found["requests"])
    if request is not None:
        scope = say(lang, "scope_request", request=request)
    verdict = say(lang, "verdict_" + found["verdict"])
    console.print(f"[bold]{safe(say(lang, 'verdict_line', scope=scope, verdict=verdict))}[/]")
    total = f"{found['total_ns'] / 1e6:,.2f}"
    console.print(say(lang, "shares", total=total, label=label, work=f"{found['work_share']:.0%}"))
    stage = found["dominant_stage"]
    if stage is not None:
        console.print(say(lang, "stage", stage=stage["stage"], share=f"{stage['share']:.0%}", label=label))
    for cause in found["causes"]:
        if cause["is_named"]:
            _print_cause(console, cause, label, lang)
    others = [f"{c['cause']} {c['share']:.1%}" for c in found["causes"] if not c["is_named"] and c["share"] >= SMALL]
    if others:
        console.print(f"({label}) {', '.join(others)}")
    for row in found.get("outliers", ()):
        places = {"request": row["request"], "ms": f"{row['ttft_ns'] / 1e6:,.2f}", "causes": ", ".join(row["causes"])}
        console.print(safe(say(lang, "outlier", **places, share=f"{row['share']:.0%}", label=label)))
    print_remarks(console, found["remarks"])


def _print_cause(console: Console, cause: Mapping[str, Any], label: str, lang: Lang) -> None:
    name, share = f"{cause['class']}/{cause['cause']}", f"{cause['share']:.0%}"
    console.print(f"\n[bold]{share:>4}  {name}[/] ({label})  {say(lang, 'cause_' + cause['cause'])}")
    if cause["behind"]:
        names = ", ".join(f"{row['request']} ({row['time_ns'] / 1e6:,.2f} ms)" for row in cause["behind"])
        console.print(f"      {safe(say(lang, 'behind', names=names))}")
    for row in cause["evidence"]:
        hidden = NOT_TOLD if row["told"].get("need_blocks") else (*NOT_TOLD, "need_blocks", "headroom")
        kept = {key: value for key, value in row["told"].items() if key not in hidden and value not in ("", None)}
        told = ", ".join(f"{key} {value}" for key, value in kept.items())
        text = say(lang, "evidence", record=row["record"], ms=f"{row['explains_ns'] / 1e6:,.2f}", told=told)
        console.print(f"      {safe(text)}")
        if row["blocks_held"]:
            held = ", ".join(f"{name} {blocks}" for name, blocks in row["blocks_held"].items())
            console.print(f"        {safe(say(lang, 'blocks_held', held=held))}")
    if {cause["cause"], *cause["beside"]} >= LIMITS:
        console.print(f"      {say(lang, 'both_limits')}")
    console.print(f"      {say(lang, 'refuted', text=say(lang, 'refute_' + cause['cause']))}")
