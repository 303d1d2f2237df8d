"""A load run's report as a table for people.

What it is: the picture above the JSON document. What it knows nothing about: how the
figures came about. Invariants: every figure is the document's; what is undefined is a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanovllm.cli.terminal import harmless

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT per token", "itl": "ITL between chunks", "e2e": "E2E"}
STATISTICS = ("mean", "p50", "p90", "p99", "max")


def print_report(document: Mapping[str, Any]) -> None:
    """Latency table, then the other figures in a line each, then what to know about them."""
    console = Console(highlight=False)
    console.print(_latencies(document["latency_ms"], document["label"]))
    for name, text in _lines(document):
        console.print(f"[dim]{name:<12}[/]{escape(harmless(text))}", soft_wrap=True)
    for sentence in document["remarks"]:
        console.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)


def _latencies(found: Mapping[str, Any], label: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"ms, {label}", no_wrap=True)
    for name in (*STATISTICS, "count"):
        table.add_column(name, justify="right")
    for name, title in LATENCIES.items():
        row = found[name]
        cells = ["-" if row[part] is None else f"{row[part]:,.2f}" for part in STATISTICS]
        table.add_row(title, *cells, f"{row['count']:,}")
    return table


def _lines(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    requests, rates, client = document["requests"], document["throughput"], document["client"]
    tokens, lateness = document["tokens"], client["lateness_ms"]
    late = "" if lateness is None else f"; P99 of lateness {lateness['p99']:.2f} ms"
    lines = [
        (
            "requests",
            f"{requests['sent']:,} sent in {document['duration_s']:.2f} s: {requests['completed']:,} completed"
            f"{_reasons(requests['finish_reasons'])}, {requests['rejected']:,} rejected"
            f"{_reasons(requests['rejected_by_status'])}, {requests['failed']:,} failed"
            f"{_reasons(requests['failed_by_reason'])}",
        ),
        ("tokens", f"{tokens['prompt']:,} prompt ({tokens['cached']:,} of them cached), {tokens['output']:,} output"),
        (
            "throughput",
            f"{rates['requests_per_s']:,.2f} requests/s, {rates['output_tokens_per_s']:,.1f} output tokens/s, "
            f"{rates['total_tokens_per_s']:,.1f} tokens/s in all",
        ),
        ("client", f"{client['cpu_s']:.2f} s of processor, {client['cpu_share_of_one_core']:.0%} of one core{late}"),
    ]
    good = document["goodput"]
    if good is not None:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in good["slo_ms"].items())
        lines.insert(3, ("goodput", f"{good['requests_per_s']:,.2f} requests/s: {good['requests']:,} met {limits}"))
    return lines


def _reasons(found: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{name}: {count}' for name, count in found.items())})" if found else ""
