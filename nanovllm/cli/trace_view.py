"""What `nanovllm trace` prints for people.

What it is: tables and lines over the documents of `observe/`. What it knows nothing about:
how the figures came about. Invariants: every figure carries its label; what is undefined is a
dash; whatever a file made up is shown harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanovllm.cli.terminal import harmless
from nanovllm.observe.paths import Replay, RequestPath
from nanovllm.observe.timeline_view import render
from nanovllm.observe.wording import Lang, say

COLUMNS = {
    "request": "request",
    "prompt_len": "prompt",
    "cached_tokens": "cached",
    "generated_len": "out",
    "t_queue_ns": "T_queue",
    "t_prefill_ns": "T_prefill",
    "ttft_ns": "TTFT",
    "tpot_ns": "TPOT",
    "end_to_end_ns": "E2E",
    "preemptions": "preempted",
    "end": "end",
}
MOST_GAPS = 3


def print_path(run: Replay, path: RequestPath, lang: Lang) -> None:
    """The terms with their label, the check of their sums, then each record's moment."""
    console, timeline = _console(), path.timeline
    told = f"{path.name}: {path.prompt_len} prompt tokens; {path.cached_tokens} cached; {path.generated_len} generated"
    console.print(_safe(f"{told}; {path.end or 'unfinished'}"), render(timeline), sep="\n")
    console.print(sums(path, lang))
    for event in path.events:
        if event.stage == "decode_step":
            continue
        at_ms = (event.ts_ns - timeline.arrival_ns) / 1e6
        tokens = f", {event.tokens} tokens" if event.tokens else ""
        batch = f", batch of {event.batch_size}" if event.batch_size else ""
        console.print(
            f"{at_ms:>12,.2f} ms  {run.recording.label:<10} record {event.seq:<7} {event.stage}{tokens}{batch}"
        )
    gaps = sorted(enumerate(timeline.decode_gaps_ns, 2), key=lambda gap: -gap[1])[:MOST_GAPS]
    longest = ", ".join(f"{gap / 1e6:,.2f} ms before token {number}" for number, gap in gaps)
    if longest:
        console.print(f"longest decode gaps ({run.recording.label}): {longest}")
    _remarks(console, run.recording.remarks)


def sums(path: RequestPath, lang: Lang) -> str:
    """Whether the terms make up what they should, computed anew from the terms."""
    t = path.timeline
    parts = (t.t_queue_ns, t.t_schedule_ns, t.t_prefill_ns, t.t_return_ns)
    if t.ttft_ns is None or None in parts:
        return say(lang, "no_sums")
    assert sum(part or 0 for part in parts) == t.ttft_ns, "the terms are differences of the same marks"
    lines = [say(lang, "sums", ttft=f"{t.ttft_ns:,}")]
    if t.end_to_end_ns is not None:
        assert t.ttft_ns + sum(t.decode_gaps_ns) + (t.t_stream_ns or 0) == t.end_to_end_ns
        lines.append(say(lang, "sums_end", total=f"{t.end_to_end_ns:,}"))
    return "; ".join(lines)


def print_table(rows: Iterable[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """All requests, and the run in a few lines."""
    console = _console()
    table = Table(box=None, padding=(0, 2, 0, 0), caption=f"times in ms, {found['label']}", caption_justify="left")
    for title in COLUMNS.values():
        table.add_column(title, justify="left" if title in ("request", "end") else "right")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in COLUMNS))
    console.print(table)
    state, rates, header = found["state"], found["throughput"], found["header"]
    label = found["label"]
    live, used = state["live_requests"], state["used_blocks"]
    lines = {
        "run": f"{header['model']}, {header['dtype']}, {header['policy']}, {header['schedule_mode']}, prefix_mode "
        f"{header['prefix_mode']}, {header['prior_state']}, {header['num_blocks']} blocks of {header['block_size']}",
        "throughput": f"{_number(rates['requests_per_s'])} requests/s, {_number(rates['output_tokens_per_s'])} "
        f"output tokens/s ({label})",
        "live": f"mean {_number(live['mean'])}, max {live['max']}; still prefilling, mean "
        f"{_number(state['prefilling_requests']['mean'])} ({label})",
        "blocks": f"used, mean {_number(used['mean'])}, max {used['max']} of {header['num_blocks']} ({label})",
    }
    if found["block_calls_ns"]:
        calls = (f"{name} {ns['mean_per_step'] / 1e3:,.1f}" for name, ns in found["block_calls_ns"].items())
        lines["block calls"] = f"us a step: {', '.join(calls)} ({label})"
    for name, text in lines.items():
        console.print(f"[bold]{name:<12}[/]{_safe(text)}")
    _remarks(console, found["remarks"])


def print_comparison(found: Mapping[str, Any], lang: Lang) -> None:
    """Both runs, figure by figure."""
    console = _console()
    for name, (a, b) in found["differs"].items():
        console.print(f"[bold]{name:<16}[/]{_safe(f'{a}  |  {b}')}")
    table = Table(box=None, padding=(0, 2, 0, 0), caption="latencies in ms", caption_justify="left")
    first, second = (f"{name} ({label})" for name, label in zip("AB", found["labels"], strict=True))
    for title in ("figure", first, second, "B / A"):
        table.add_column(title, justify="left" if title == "figure" else "right")
    for name, row in found["figures"].items():
        table.add_row(name, *(_number(row[part]) for part in ("first", "second", "ratio")))
    console.print(table)
    if "prior_state" in found["differs"]:
        a, b = found["differs"]["prior_state"]
        console.print(say(lang, "cold_warm", first=a, second=b))
    _remarks(console, found["remarks"])


def print_diagnosis(found: Mapping[str, Any], lang: Lang) -> None:
    """The verdict, then each cause that is named with its evidence, then the other shares."""
    console, label = _console(), found["label"]
    request = found["scope"]["request"]
    scope = say(lang, "scope_run", requests=found["requests"])
    if request is not None:
        scope = say(lang, "scope_request", request=request)
    console.print(f"[bold]{_safe(scope)}: {say(lang, 'verdict_' + found['verdict'])}[/]")
    total = f"{found['total_ns'] / 1e6:,.2f}"
    console.print(say(lang, "shares", total=total, label=label, work=f"{found['work_share']:.0%}"))
    stage = found["dominant_stage"]
    if stage is not None:
        console.print(say(lang, "stage", stage=stage["stage"], share=f"{stage['share']:.0%}"))
    for cause in found["causes"]:
        if cause["is_named"]:
            _print_cause(console, cause, lang)
    others = [f"{c['cause']} {c['share']:.1%}" for c in found["causes"] if not c["is_named"] and c["share"] >= 0.001]
    if others:
        console.print(f"({label}) {', '.join(others)}")
    for row in found.get("outliers", ()):
        places = {"request": row["request"], "ms": f"{row['ttft_ns'] / 1e6:,.2f}", "causes": ", ".join(row["causes"])}
        console.print(_safe(say(lang, "outlier", **places, share=f"{row['share']:.0%}")))
    _remarks(console, found["remarks"])


def _print_cause(console: Console, cause: Mapping[str, Any], lang: Lang) -> None:
    name, share = f"{cause['class']}/{cause['cause']}", f"{cause['share']:.0%}"
    console.print(f"\n[bold]{share:>4}  {name}[/]  {say(lang, 'cause_' + cause['cause'])}")
    if cause["behind"]:
        names = ", ".join(f"{row['request']} ({row['time_ns'] / 1e6:,.2f} ms)" for row in cause["behind"])
        console.print(f"      {_safe(say(lang, 'behind', names=names))}")
    for row in cause["evidence"]:
        told = ", ".join(f"{key} {value}" for key, value in row["told"].items() if value not in ("", None))
        text = say(lang, "evidence", record=row["record"], ms=f"{row['explains_ns'] / 1e6:,.2f}", told=told)
        console.print(f"      {_safe(text)}")
        if row["blocks_held"]:
            held = ", ".join(f"{name} {blocks}" for name, blocks in row["blocks_held"].items())
            console.print(f"        {_safe(say(lang, 'blocks_held', held=held))}")
    console.print(f"      {say(lang, 'refuted', text=say(lang, 'refute_' + cause['cause']))}")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _safe(text: str) -> str:
    return escape(harmless(text).replace("\n", " "))


def _remarks(console: Console, remarks: Iterable[str]) -> None:
    for sentence in remarks:
        console.print(f"[yellow]{_safe(sentence)}[/]")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:,.2f}" if name.endswith("_ns") else _safe(str(value))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
