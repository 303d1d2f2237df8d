"""A capacity document as text for people.

What it is: lines and tables. What it knows nothing about: how the figures came
about. Invariants: every figure is the document's; each section says its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from nanovllm.cli.fitted_table import Column, fitted

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
    "kept as headroom": ("headroom",),
    "free": ("free",),
}
LEGEND = (
    "Shares of slots, means over the ticks at which somebody waits. Internal fragmentation: given out, never filled; "
    "external: free, but in holes too short for the next request; headroom: free and enough for it, but kept so that "
    "who is live can grow. Failed admissions: ticks at which it got no room."
)
ORACLE_NOTE = (
    "reserve-exact is an oracle: it is told every output's length, as no allocator in use can be, and so needs no room "
    "to grow. paged is the engine's rule: at admission it keeps one block free for each live request, which weighs "
    "most where requests are small; there it may hold fewer of them than the oracle. The same pages without "
    "headroom stand beside it: what they hold more is paid for with preemptions."
)


def print_report(report: Mapping[str, Any]) -> None:
    """The sections in the order in which the arithmetic goes."""
    console = Console(highlight=False, soft_wrap=True)
    for name, text in [*_arithmetic(report), *_concurrency(report), *_ledger(report)]:
        console.print(f"[bold]{name:<22}[/]{escape(text)}")
    console.print()
    _print_table(console, "by block size (estimated)", _block_sizes(report))
    console.print(f"\n{LIMITS_NOTE}")
    for name, text in [*_sharing(report), *_weights(report)]:
        console.print(f"[bold]{name:<22}[/]{escape(text)}")
    if "compare" in report:
        _print_comparison(console, report["compare"])


def _print_comparison(console: Console, found: Mapping[str, Any]) -> None:
    """The allocators side by side; shares are those of the ticks at which somebody waits."""
    work, rows = found["workload"], found["allocators"]
    title = f"{work['name']}, {work['requests']:,} requests, {found['capacity_tokens']:,} token slots (simulated)"
    shares = [row["shares_while_somebody_waits"] or row["shares"] for row in rows]
    columns = [Column("", [*_COUNTS, *_SHARES])]
    for row, share in zip(rows, shares):
        counts = [f"{row[key]:,.1f}" if isinstance(row[key], float) else f"{row[key]:,}" for key in _COUNTS.values()]
        parts = [f"{sum(share[kind] for kind in kinds):.1%}" for kinds in _SHARES.values()]
        columns.append(Column(row["allocator"], [*counts, *parts]))
    console.print()
    _print_table(console, title, columns)
    console.print(escape(f"{LEGEND} {found['note']}."))
    console.print(escape(ORACLE_NOTE))


def _print_table(console: Console, title: str, columns: Sequence[Column]) -> None:
    console.print(f"[italic]{escape(title)}[/]")
    for line in fitted(columns, console.width):
        console.print(escape(line))


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


def _block_sizes(report: Mapping[str, Any]) -> list[Column]:
    rows = report["block_sizes"]
    keys = {
        "block size": "block_size",
        "blocks": "num_blocks",
        "blocks a request": "blocks_per_request",
        "empty slots": "empty_slots",
        "fit after prefill": "after_prefill",
        "fit at end": "at_end",
    }
    columns = [Column(name, [f"{row[key]:,}" for row in rows]) for name, key in keys.items()]
    columns.append(Column("used", [f"{row['used_share']:.2%}" for row in rows]))
    if "sharing" in report:
        columns.append(Column("potential at end, shared", [f"{row['at_end_shared']:,}" for row in rows]))
    return columns


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
