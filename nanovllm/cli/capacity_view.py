"""A capacity document as text for people.

What it is: lines and one table. What it knows nothing about: how the figures came
about. Invariants: every figure is the document's; each section says its label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

LIMITS_NOTE = (
    "The engine admits by known tokens and keeps room for growth: between the two concurrencies some wait or are "
    "preempted. max_num_seqs (64 by default) and the watermark (1 % of the blocks) are limits of their own."
)

_COUNTS = {
    "live requests, mean": "mean_concurrency",
    "live requests, most": "max_concurrency",
    "ticks": "ticks",
    "failed admissions": "failed_admissions",
    "refused": "refused",
    "preempted": "preemptions",
}
_SHARES = {
    "used": ("used",),
    "waste by reservation": ("reserved", "internal"),
    "  filled later": ("reserved",),
    "  internal fragmentation": ("internal",),
    "external fragmentation": ("external",),
    "free": ("free",),
}
LEGEND = (
    "Shares of slots, means over the ticks at which somebody waits. Internal fragmentation: given out, never filled; "
    "external: free, but in holes too short for the next request. Failed admissions: ticks at which it got no room."
)


def print_report(report: Mapping[str, Any]) -> None:
    """The sections in the order in which the arithmetic goes."""
    console = Console(highlight=False, soft_wrap=True)
    for name, text in [*_arithmetic(report), *_concurrency(report), *_ledger(report)]:
        console.print(f"[bold]{name:<22}[/]{escape(text)}")
    console.print()
    console.print(_block_sizes(report), soft_wrap=False)
    console.print(f"\n{LIMITS_NOTE}")
    for name, text in [*_sharing(report), *_weights(report)]:
        console.print(f"[bold]{name:<22}[/]{escape(text)}")
    if "compare" in report:
        _print_comparison(console, report["compare"])


def _print_comparison(console: Console, found: Mapping[str, Any]) -> None:
    """The allocators side by side; shares are those of the ticks at which somebody waits."""
    work, rows = found["workload"], found["allocators"]
    title = f"{work['name']}, {work['requests']:,} requests, {found['capacity_tokens']:,} token slots (simulated)"
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(row["allocator"], justify="right")
    for name, key in _COUNTS.items():
        table.add_row(name, *(f"{row[key]:,.1f}" if isinstance(row[key], float) else f"{row[key]:,}" for row in rows))
    for name, kinds in _SHARES.items():
        shares = (row["shares_while_somebody_waits"] or row["shares"] for row in rows)
        table.add_row(name, *(f"{sum(share[kind] for kind in kinds):.1%}" for share in shares))
    console.print()
    console.print(table, soft_wrap=False)
    console.print(escape(f"{LEGEND} {found['note']}."))


def _arithmetic(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    pool, request = report["pool"], report["request"]
    return [
        ("KV of one token", f"{report['formula']} ({report['model']['dtype']}; estimated)"),
        (
            "pool",
            f"{pool['memory_bytes']:,} B / ({pool['block_size']} tokens x {report['kv_bytes_per_token']:,} B "
            f"= {pool['block_bytes']:,} B a block) = {pool['num_blocks']:,} blocks "
            f"= {pool['num_blocks'] * pool['block_size']:,} tokens (estimated)",
        ),
        ("after prefill", _size(request["after_prefill"])),
        ("at the end of output", _size(request["at_end"])),
    ]


def _size(size: Mapping[str, int]) -> str:
    return (
        f"{size['tokens']:,} tokens = {size['token_exact_bytes']:,} B token-exact; {size['blocks']:,} blocks "
        f"= {size['block_exact_bytes']:,} B block-exact; approximation bound {size['bound_bytes']:,} B "
        f"= {size['bound_tokens']} empty slots (estimated)"
    )


def _concurrency(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = report["concurrency"]
    return [
        (
            "requests that fit",
            f"{found['paged_after_prefill']:,} after prefill, {found['paged_at_end']:,} at the end of output "
            f"(paged, estimated)",
        ),
        (
            "  token-exact",
            f"{found['token_exact_after_prefill']:,} and {found['token_exact_at_end']:,}: no block, no tail; theory",
        ),
        (
            "  reserve-max",
            f"{found['reserve_max']:,}, each reserving {found['reserve_max_tokens']:,} tokens in one piece (estimated)",
        ),
    ]


def _ledger(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    ledger = report["ledger"]
    parts = (("tokens", "live_bytes"), ("empty slots", "tail_bytes"), ("blocks left over", "left_over_bytes"),
             ("uncut end", "uncut_bytes"))  # fmt: skip
    shown = "; ".join(f"{name} {ledger[key]:,} B" for name, key in parts)
    return [("full of them", f"{shown}; {ledger['used_share']:.2%} of theoretical capacity holds tokens (estimated)")]


def _block_sizes(report: Mapping[str, Any]) -> Table:
    shares = "sharing" in report
    names = ["block size", "blocks", "blocks a request", "empty slots", "fit after prefill", "fit at end", "used"]
    table = Table(box=None, padding=(0, 1, 0, 0), title="by block size (estimated)", title_justify="left")
    for name in [*names, *(["potential at end, shared"] if shares else [])]:
        table.add_column(name, justify="right")
    for row in report["block_sizes"]:
        numbers = [row[key] for key in ("block_size", "num_blocks", "blocks_per_request", "empty_slots")]
        numbers += [row["after_prefill"], row["at_end"]]
        cells = [*(f"{number:,}" for number in numbers), f"{row['used_share']:.2%}"]
        table.add_row(*cells, *([f"{row['at_end_shared']:,}"] if shares else []))
    return table


def _sharing(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "sharing" not in report:
        return []
    found = report["sharing"]
    return [
        (
            "shared prefix",
            f"{found['shared_prefix']:,} tokens, {found['shared_blocks']:,} full blocks of them: "
            f"{found['potential_concurrency_at_end']:,} at the end of output ({found['note']}; estimated)",
        )
    ]


def _weights(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = report["weights"]
    place = "inside --memory" if found["inside_memory"] else "beside --memory, not in it"
    verdict = "fit" if found["fits_here"] else "do not fit"
    return [
        (
            "weights",
            f"{found['parameters']:,} parameters (norms left out) x {found['bytes_per_parameter']} B "
            f"= {found['bytes']:,} B, {place} (estimated)",
        ),
        (
            "this machine",
            f"{found['free_memory_bytes']:,} B free (measured): weights and KV {verdict}, here and now",
        ),
    ]
