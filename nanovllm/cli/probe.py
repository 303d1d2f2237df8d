"""`nanovllm probe`: how much of a trace's or a workload's prompts had been seen before, as prefixes.

What it is: the verb and its lines. What it knows nothing about: how overlap is
counted (`observe/probe.py`). Invariants: every figure stands beside what it is, a
potential-overlap signal and not a realised gain, in the text and in the document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nanovllm.core.clock import Clock
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.prefix_trace import PrefixTraceWriter, block_tokens_of, probe_trace, read_prefix_trace
from nanovllm.observe.probe import ALL, LABEL, STATEMENT, OverlapFigure, PrefixProbe

EXAMPLES = """Examples:

  nanovllm probe mooncake_conversation_trace.jsonl

  nanovllm probe mooncake_synthetic_trace.jsonl --block-size 512 --block-size 4096 --capacity 1000 --capacity 10000

  nanovllm probe --workload multi_turn --block-size 16 --block-size 64 --capacity 256

  nanovllm probe --workload rag --record rag.jsonl

FILE has one request a line: {"timestamp": ms, "input_length": tokens, "hash_ids": [...]}, as Mooncake's traces.
"""


BLOCKS, WORKLOAD = "Blocks and caches", "Workload"


def _flag(name: str, text: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, **more)


def probe(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A trace with hash_ids, JSON lines.", show_default=False)
    ] = None,
    *,
    block_size: Annotated[
        list[int] | None,
        _flag("--block-size", "Tokens a block; repeatable (default: the trace's own, or 16).", BLOCKS, min=1),
    ] = None,
    capacity: Annotated[
        list[int] | None,
        _flag("--capacity", "Beside the infinite cache, an LRU one of so many blocks; repeatable.", BLOCKS, min=1),
    ] = None,
    hash_block: Annotated[
        int | None, _flag("--hash-block", "Tokens a hash id stands for (default: told by the lengths).", BLOCKS, min=1)
    ] = None,
    workload: Annotated[
        str | None, _flag("--workload", "Instead of FILE: one of the lab's, on a simulated engine.", WORKLOAD)
    ] = None,
    sessions: Annotated[
        int | None, _flag("--sessions", "Its size (default: the workload's own).", WORKLOAD, min=1, max=10**5)
    ] = None,
    num_blocks: Annotated[
        int, _flag("--num-blocks", "Blocks of 16 in the engine's pool.", WORKLOAD, min=1, max=2**22)
    ] = 4096,
    seed: Annotated[int, _flag("--seed", "Same seed, same workload.", WORKLOAD, min=0, max=2**32)] = 0,
    record: Annotated[
        Path | None,
        _flag("--record", "Write its prompts to this file as such a trace, without a token.", WORKLOAD, metavar="OUT"),
    ] = None,
    as_json: Annotated[bool, _flag("--json", "Print one JSON document.")] = False,
) -> None:
    """Look at a trace, or a workload, through an observe-only prefix probe: potential overlap per block size and cache.

    Nothing is reused, and nothing is said about what reuse would bring.
    """
    bounds: list[int | None] = [None, *(capacity or [])]
    if (file is None) == (workload is None):
        raise InvalidRequestError("Give a FILE, or --workload NAME.", param="file")
    if record is not None and workload is None:
        raise InvalidRequestError("record writes what a workload asks.", param="record", hint="Add --workload rag.")
    if workload is not None:
        shadow = PrefixProbe(block_size or [16], bounds)
        turned = {"seed": seed} | ({"sessions": sessions} if sessions else {})
        source = _serve(workload, turned, num_blocks, shadow, record)
    else:
        assert file is not None
        shadow, source = _replay(file, block_size, bounds, hash_block)
    report = {
        "label": LABEL,
        "statement": STATEMENT,
        "source": source,
        "figures": [figure.as_dict() for figure in shadow.figures()],
    }
    if as_json:
        print(json.dumps(report, allow_nan=False))
    else:
        _print(source, shadow.figures())


def _replay(
    file: Path, block_size: list[int] | None, bounds: list[int | None], hash_block: int | None
) -> tuple[PrefixProbe, dict[str, Any]]:
    """A recorded trace through the probe, and what the trace is."""
    unit = hash_block or block_tokens_of(read_prefix_trace(file))
    sizes = list(block_size or [unit])
    if any(size % unit for size in sizes):
        raise InvalidRequestError(
            f"A block size must be a multiple of {unit}, the tokens of one hash id.", param="block_size"
        )
    shadow = PrefixProbe(sizes, bounds, unit)
    facts = probe_trace(read_prefix_trace(file), shadow, unit)
    return shadow, {"kind": "trace", **facts.as_dict(), "hash_block": unit}


def _serve(
    name: str, turned: dict[str, Any], num_blocks: int, shadow: PrefixProbe, record: Path | None
) -> dict[str, Any]:
    """A workload on a simulated engine with the probe beside it, and what the engine counted itself."""
    from nanovllm.lab.simulated import DEFAULT_MODE, simulated_engine
    from nanovllm.lab.workload_run import run_workload
    from nanovllm.lab.workloads import generate

    plan = generate(name, **turned)
    engine = simulated_engine(num_blocks, block_size=16)
    engine.observers.add(shadow)
    with _recorder(record, engine.clock) as recorder:
        if recorder is not None:
            engine.observers.add(recorder)
        run = run_workload(engine, plan)
    return {
        "kind": "workload",
        "workload": name,
        "knobs": plan.knobs.as_dict(),
        "engine": "simulated",
        "prefix_mode": DEFAULT_MODE,
        "block_size": 16,
        "num_blocks": num_blocks,
        "served": len(run.finals),
        "refused": len(run.refused),
        "skipped": len(run.skipped),
        "potential_cached_tokens": sum(final.potential_cached_tokens for final in run.finals.values()),
    }


@contextmanager
def _recorder(path: Path | None, clock: Clock) -> Iterator[PrefixTraceWriter | None]:
    """Who writes the trace, while the file is open. Raises InvalidRequestError where it cannot be written."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror or error}.", param="record") from error
    with file:
        yield PrefixTraceWriter(file, clock)


def _print(source: dict[str, Any], figures: list[OverlapFigure]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(escape(_described(source)))
    if len({figure.namespace for figure in figures}) == 2:  # the only one and the sum over it: the same figures
        figures = [figure for figure in figures if figure.namespace == ALL]
    for figure in figures:
        console.print(escape(str(figure)))


def _described(source: dict[str, Any]) -> str:
    if source["kind"] == "trace":
        return (
            f"{source['requests']:,} requests, {source['tokens']:,} prompt tokens, {source['block_names']:,} blocks of "
            f"{source['hash_block']} tokens named, {source['distinct_block_names']:,} of them distinct, "
            f"in {source['last_ms'] / 1000:,.0f} s"
        )
    return (
        f"{source['workload']}: {source['served']:,} requests served, {source['refused']:,} refused, by a simulated "
        f"engine of {source['num_blocks']:,} blocks, prefix_mode {source['prefix_mode']}. It counted "
        f"{source['potential_cached_tokens']:,} potential tokens itself, as each was admitted [{LABEL}: {STATEMENT}]"
    )
