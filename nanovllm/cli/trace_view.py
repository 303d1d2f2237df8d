"""What `nanovllm trace show` prints for people: one request's path, or a run as a table and its figures.

What it is: tables and lines over the documents of `observe/`. What it knows nothing about:
how the figures came about. Invariants: every figure carries its label; what is undefined is a
dash; whatever a file made up is shown harmless; no figure is cut: a table that is too wide for
the terminal leaves whole columns out and names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
DISPENSABLE = (
    "preempted",
    "cached",
    "T_prefill",
    "TPOT",
    "out",
    "end",
    "p90",
    "mean",
    "prompt",
    "max",
    "T_queue",
    "count",
    "E2E",
)
LATENCIES = {
    "ttft": "TTFT",
    "queue": "T_queue",
    "prefill": "T_prefill",
    "tpot": "TPOT",
    "itl": "ITL",
    "jitter": "jitter",
    "e2e": "E2E",
}
GAP, LONGEST_NAME, MOST_GAPS, BAR = 2, 24, 3, " ▏▎▍▌▋▊▉█"
TIMELINE_WIDTH, NO_TERMINAL = 72, 10_000


def print_path(run: Replay, path: RequestPath, row: Mapping[str, Any], lang: Lang) -> None:
    """The terms with their label, the check of their sums, then each record's moment, then its state."""
    console, timeline, label = make_console(), path.timeline, run.recording.label
    told = f"{path.name}: {path.prompt_len} prompt tokens; {path.cached_tokens} cached; {path.generated_len} generated"
    console.print(safe(f"{told}; {path.end or 'unfinished'}"))
    for line in render(timeline).splitlines():
        console.print(line if console.width >= TIMELINE_WIDTH else line.rstrip(BAR))
    console.print(sums(path, lang))
    for event in path.events:
        if event.stage == "decode_step":
            continue
        at_ms = (event.ts_ns - timeline.arrival_ns) / 1e6
        tokens = f", {event.tokens} tokens" if event.tokens else ""
        batch = f", batch of {event.batch_size}" if event.batch_size else ""
        console.print(f"{at_ms:>12,.2f} ms  {label:<10} record {event.seq:<7} {event.stage}{tokens}{batch}")
    gaps = sorted(enumerate(timeline.decode_gaps_ns, 2), key=lambda gap: -gap[1])[:MOST_GAPS]
    longest = ", ".join(f"{gap / 1e6:,.2f} ms before token {number}" for number, gap in gaps)
    if longest:
        console.print(f"longest decode gaps ({label}): {longest}")
    state = row["state"]
    console.print(
        f"state ({state['label']}): {state['blocks']} blocks, {state['block_exact_bytes']:,} bytes in blocks, "
        f"{state['token_exact_bytes']:,} in its {state['tokens']} tokens; "
        f"approximation bound {state['approximation_bound_bytes']:,} bytes"
    )
    print_remarks(console, run.recording.remarks)


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


def print_run(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """All requests, the distribution of each latency, and the run's other figures in a line each."""
    console, label = make_console(), found["label"]
    cells = [[_cell(name, row[name]) for name in COLUMNS] for row in rows]
    print_table(console, list(COLUMNS.values()), cells, f"times in ms, {label}", left=("request", "end"))
    parts = ("mean", "p50", "p90", "p99", "max")
    latency = {title: found["latency_ms"][name] for name, title in LATENCIES.items()}
    cells = [[title, *(number(row[part]) for part in parts), str(row["count"])] for title, row in latency.items()]
    print_table(console, ["ms", *parts, "count"], cells, f"{label}; of completed requests", left=("ms",))
    for name, text in [*_run_lines(found), *_state_lines(rows, found), *_cost_lines(found)]:
        console.print(f"[bold]{name:<12}[/]{safe(text)}")
    print_remarks(console, found["remarks"])


def _run_lines(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    header, requests, rates = found["header"], found["requests"], found["throughput"]
    yield (
        "run",
        f"{header['model']}, {header['dtype']}, {header['policy']}, {header['schedule_mode']}, prefix_mode "
        f"{header['prefix_mode']}, {header['prior_state']}, {header['num_blocks']} blocks of {header['block_size']}",
    )
    ends = ", ".join(f"{count} {end}" for end, count in requests["ends"].items())
    yield "requests", f"{requests['sent']} sent: {ends or 'none'}; {requests['preemptions']} preemptions"
    yield (
        "throughput",
        f"{number(rates['requests_per_s'])} requests/s, {number(rates['output_tokens_per_s'])} output tokens/s "
        f"({found['label']})",
    )
    good = found["goodput"]
    if good is not None:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in good["slo_ms"].items())
        rate = f"{number(good['requests_per_s'])} requests/s ({found['label']})"
        yield "goodput", f"{rate}: {good['requests']} met {limits}"


def _state_lines(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    state, label = found["state"], found["label"]
    levels = {name: state[f"{name}_requests"] for name in ("live", "prefilling", "waiting")}
    told = (f"{name} mean {number(level['mean'])}, max {level['max']:g}" for name, level in levels.items())
    yield "state", f"requests: {'; '.join(told)} ({label})"
    levels = {name: state[f"{name}_blocks"] for name in ("used", "cached", "free")}
    told = (f"{name} mean {number(level['mean'])}, max {level['max']:g}" for name, level in levels.items())
    yield "", f"blocks of {state['num_blocks']}: {'; '.join(told)} ({label})"
    kinds = (f"{kind} {size:,}" for kind, size in state["bytes_by_kind_max"].items())
    yield "", f"bytes at most: {', '.join(kinds)} ({label})"
    sizes = [row["state"] for row in rows if row["state"]["blocks"]]
    if sizes:
        mean = sum(size["block_exact_bytes"] for size in sizes) // len(sizes)
        bound = sum(size["approximation_bound_bytes"] for size in sizes) // len(sizes)
        largest = max(size["block_exact_bytes"] for size in sizes)
        yield "", f"bytes a request: mean {mean:,}, max {largest:,}, mean approximation bound {bound:,} (estimated)"
    sharing = state["sharing_factor"]
    yield "", f"sharing: {number(sharing['mean'])} block table entries a used block ({sharing['label']})"


def _cost_lines(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    cost, stable, label = found["cost"], found["stability"], found["label"]
    yield (
        "cost",
        f"{number(cost['block_seconds_per_token'])} block-seconds, {number(cost['processor_seconds_per_token'])} "
        f"processor-seconds an output token ({label})",
    )
    ratios = (f"{name} {number(stable[f'{key}_p99_over_p50'])}" for key, name in (("ttft", "TTFT"), ("tpot", "TPOT")))
    yield "stability", f"P99 over P50: {', '.join(ratios)} ({label})"
    if found["block_calls_ns"]:
        calls = (f"{name} {ns['mean_per_step'] / 1e3:,.1f}" for name, ns in found["block_calls_ns"].items())
        yield "block calls", f"us a step: {', '.join(calls)} ({label})"


def print_table(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    *,
    left: Sequence[str] = (),
) -> None:
    """A table of as many columns as the terminal has room for; all of them where it is no terminal."""
    widths = [max(len(text) for text in column) + GAP for column in zip(titles, *rows)]
    kept = dict(zip(titles, widths))
    for title in DISPENSABLE if console.is_terminal else ():
        if sum(kept.values()) > console.width:
            kept.pop(title, None)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for title in kept:
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(text) for title, text in zip(titles, row) if title in kept))
    console.print(table)
    gone = [title for title in titles if title not in kept]
    console.print(f"({caption}{'; no room for ' + ', '.join(gone) if gone else ''})", style="dim")


def make_console() -> Console:
    """Where everything goes: long lines are the terminal's to wrap, a file has no width, and NO_COLOR is heard."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=NO_TERMINAL)


def safe(text: str) -> str:
    """One line that steers neither terminal nor rich."""
    return escape(harmless(text).replace("\n", " "))


def print_remarks(console: Console, remarks: Iterable[str]) -> None:
    """What a reader must know before believing it."""
    for sentence in remarks:
        console.print(f"[yellow]{safe(sentence)}[/]")


def number(value: float | None) -> str:
    """Two decimals, or three digits of something small; a dash where there is nothing."""
    if value is None:
        return "-"
    return f"{value:,.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value / 1e6:,.2f}" if name.endswith("_ns") else harmless(str(value)).replace("\n", " ")
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
