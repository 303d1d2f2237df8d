"""`nanovllm probe FILE`: how much of a recorded trace's prompts had been seen before, as prefixes.

What it is: the verb and its table. What it knows nothing about: how overlap is
counted (`observe/probe.py`). Invariants: every figure stands beside what it is, a
potential-overlap signal and not a realised gain, in the table and in the document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from nanovllm.errors import InvalidRequestError
from nanovllm.observe.prefix_trace import TraceFacts, block_tokens_of, probe_trace, read_prefix_trace
from nanovllm.observe.probe import ALL, LABEL, STATEMENT, OverlapFigure, PrefixProbe

EXAMPLES = """Examples:

  nanovllm probe mooncake_conversation_trace.jsonl

  nanovllm probe mooncake_synthetic_trace.jsonl --block-size 512 --block-size 4096 --capacity 1000 --capacity 10000

  nanovllm probe trace.jsonl --json

FILE has one request a line: {"timestamp": ms, "input_length": tokens, "hash_ids": [...]}, as Mooncake's traces.
"""


def probe(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A trace with hash_ids, JSON lines.", show_default=False)
    ],
    *,
    block_size: Annotated[
        list[int] | None,
        typer.Option("--block-size", help="Tokens a block; may be repeated (default: the trace's own).", min=1),
    ] = None,
    capacity: Annotated[
        list[int] | None,
        typer.Option("--capacity", help="Beside the infinite cache, an LRU one of so many blocks; repeatable.", min=1),
    ] = None,
    hash_block: Annotated[
        int | None,
        typer.Option("--hash-block", help="Tokens a hash id stands for (default: told by the lengths).", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Replay FILE through an observe-only prefix probe: potential overlap per block size, cache and namespace.

    Nothing is reused, and nothing is said about what reuse would bring.
    """
    unit = hash_block or block_tokens_of(read_prefix_trace(file))
    sizes = list(block_size or [unit])
    if any(size % unit for size in sizes):
        raise InvalidRequestError(
            f"A block size must be a multiple of {unit}, the tokens of one hash id.", param="block_size"
        )
    shadow = PrefixProbe(sizes, [None, *(capacity or [])], unit)
    facts = probe_trace(read_prefix_trace(file), shadow, unit)
    if as_json:
        print(json.dumps(document(facts, unit, shadow.figures())))
    else:
        _print_table(facts, unit, shadow.figures())


def document(facts: TraceFacts, unit: int, figures: Iterable[OverlapFigure]) -> dict[str, Any]:
    """The trace, and each figure with its label and statement."""
    return {
        "label": LABEL,
        "statement": STATEMENT,
        "trace": {**facts.as_dict(), "hash_block": unit},
        "figures": [figure.as_dict() for figure in figures],
    }


def _print_table(facts: TraceFacts, unit: int, figures: Iterable[OverlapFigure]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{facts.requests:,} requests, {facts.tokens:,} prompt tokens, {facts.block_names:,} blocks of {unit} tokens "
        f"named, {facts.distinct_block_names:,} of them distinct, in {facts.last_ms / 1000:,.0f} s"
    )
    shown = list(figures)
    if len({figure.namespace for figure in shown}) == 2:  # the only one and the sum over it: the same figures
        shown = [figure for figure in shown if figure.namespace == ALL]
    for figure in shown:
        console.print(escape(str(figure)))
