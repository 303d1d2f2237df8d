"""`nanovllm lab cache`: eviction policies compared on a recorded trace, without a model.

What it is: the verb and its tables. What it knows nothing about: how a policy ranks (`state/policies`), how a trace
is replayed (`lab/cache_replay.py`). Invariants: progress goes to stderr; each table says which label its figures
have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nanovllm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from nanovllm.core.cost_table import CostTable
    from nanovllm.lab.cache_comparison import Comparison
    from nanovllm.observe.wording import Lang

EXAMPLES = """Examples:

  nanovllm lab cache benchmarks/traces/mooncake_conversation_trace.jsonl.gz

  nanovllm lab cache benchmarks/traces/mooncake_synthetic_trace.jsonl.gz --policy lru --policy pgdsf --capacity 1000

  nanovllm lab cache trace.jsonl --scale 1 --cost 4.5,0.246,0.000044 --plot policies.svg

Policies: lru, lfu, gdsf, pgdsf, ttl, value_density, and clairvoyant, which knows the future; see docs/policies.md.
FILE has one request a line: {"timestamp": ms, "input_length": tokens, "hash_ids": [...]}, as Mooncake's traces.
"""
CACHE, PRICES = "Caches", "Scale and prices"


def _flag(name: str, text: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, **more)


def cache(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace with hash_ids, JSON lines, .gz or not.")],
    *,
    policy: Annotated[
        list[str] | None, _flag("--policy", "Only this one; repeatable.", CACHE, show_default=False)
    ] = None,
    capacity: Annotated[
        list[int] | None,
        _flag("--capacity", "Blocks; repeatable (default: 1 to 40 % of the distinct ones).", CACHE, min=1),
    ] = None,
    requests: Annotated[
        int | None, _flag("--requests", "Only the first so many.", CACHE, min=1, show_default=False)
    ] = None,
    ttl: Annotated[float, _flag("--ttl", "Of the policy ttl, seconds after the last use.", CACHE)] = 600.0,
    half_life: Annotated[float, _flag("--half-life", "Of a use, for value_density, seconds.", CACHE)] = 300.0,
    second_sight: Annotated[
        bool, _flag("--second-sight", "Evict only for blocks that were computed before.", CACHE)
    ] = False,
    scale: Annotated[int, _flag("--scale", "Divide lengths and blocks by this.", PRICES, min=1)] = 32,
    hash_block: Annotated[
        int | None, _flag("--hash-block", "Tokens a hash id stands for (default: told by the lengths).", PRICES, min=1)
    ] = None,
    cost: Annotated[
        str | None,
        _flag("--cost", "Prefill ms: base, a new token, a pair of tokens.", PRICES, metavar="B,N,P"),
    ] = None,
    kv_bytes: Annotated[int, _flag("--kv-bytes", "KV of one token (SmolLM2-135M, bf16).", PRICES, min=1)] = 23_040,
    plot: Annotated[
        Path | None, _flag("--plot", "Draw it: .png or .svg (needs matplotlib).", show_default=False)
    ] = None,
    as_json: Annotated[bool, _flag("--json", "Print one JSON document.")] = False,
    lang: Annotated[Literal["en", "zh"], _flag("--lang", "Language of prose; identifiers stay English.")] = "en",
) -> None:
    """Replay a trace through eviction policies: hit tokens and saved prefill time per capacity (simulated)."""
    from nanovllm.lab.allocation_plot import check_plot_path
    from nanovllm.lab.cache_comparison import ALL_POLICIES, check_policies, compare, default_capacities
    from nanovllm.lab.cache_replay import ReplaySetting
    from nanovllm.lab.cache_trace import make_cache_trace
    from nanovllm.observe.prefix_trace import block_tokens_of, read_prefix_trace

    if plot is not None:
        check_plot_path(plot)
    check_policies(policy or ())
    setting = ReplaySetting(_costs(cost), ttl, half_life, second_sight)
    unit = hash_block or block_tokens_of(read_prefix_trace(file))
    trace = make_cache_trace(
        read_prefix_trace(file), unit, setting.costs, scale=scale, bytes_per_token=kv_bytes, limit=requests
    )
    found = compare(trace, setting, policy or ALL_POLICIES, capacity or default_capacities(trace), _progress)
    if plot is not None:
        from nanovllm.lab.cache_plot import plot as draw

        draw(found, file.name.split(".")[0], plot)
    if as_json:
        print(json.dumps(found.as_dict(), allow_nan=False))
    else:
        _print(found, lang)


def _costs(given: str | None) -> CostTable:
    """The simulated engine's own, or three numbers."""
    from nanovllm.core.cost_table import CostTable
    from nanovllm.lab.simulated import default_costs

    if given is None:
        return default_costs()
    try:
        numbers = [float(part) for part in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(0 <= number < 1e9 for number in numbers):
        raise ConfigError(f"--cost takes three numbers of milliseconds, not {given!r}.", param="cost")
    base, per_new, per_pair = numbers
    return CostTable(base, per_new, per_pair)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _print(found: Comparison, lang: Lang) -> None:
    from rich.console import Console

    from nanovllm.lab.wording import say

    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    console = Console(highlight=False, soft_wrap=True)
    trace, costs = found.trace, found.setting.costs
    hits = found.infinite.as_dict()
    console.print(
        say(
            lang,
            "cache_trace",
            requests=f"{len(trace.prompts):,}",
            tokens=f"{trace.tokens:,}",
            scale=trace.scale,
            blocks=f"{trace.num_blocks:,}",
            block_tokens=trace.block_tokens,
            distinct=f"{trace.num_distinct:,}",
        )
    )
    console.print(
        say(
            lang,
            "cache_infinite",
            hit_blocks=f"{hits['hit_blocks']:,}",
            block_share=f"{hits['block_hit_share']:.1%}",
            hit_tokens=f"{hits['hit_tokens']:,}",
            token_share=f"{hits['token_hit_share']:.1%}",
            saved=f"{hits['saved_ms'] / 1000:,.1f}",
            total=f"{hits['prefill_ms'] / 1000:,.1f}",
        )
    )
    console.print("\n" + say(lang, "cache_hits"))
    console.print(_table(found, "token_hit_share", 100), soft_wrap=False)
    console.print("\n" + say(lang, "cache_saved"))
    console.print(_table(found, "saved_ms", 0.001), soft_wrap=False)
    prices = {"base": f"{costs.base_ms:g}", "per_new": f"{costs.per_new_ms:g}", "per_pair": f"{costs.per_pair_ms:g}"}
    console.print("\n" + say(lang, "cache_costs", **prices))


def _table(found: Comparison, figure: str, factor: float) -> Table:
    """A row a policy, a column a capacity in blocks; the bounds last."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("blocks")
    for capacity in found.capacities:
        table.add_column(f"{capacity:,}", justify="right")
    for policy in found.policies:
        cells = (found.run(policy, capacity).as_dict()[figure] * factor for capacity in found.capacities)
        table.add_row(policy, *(f"{cell:,.1f}" for cell in cells))
    table.add_row("infinite", *[f"{found.infinite.as_dict()[figure] * factor:,.1f}"] * len(found.capacities))
    return table
