"""A comparison of policies as a picture: what is found and what is saved, against capacity.

What it is: two panels, made with matplotlib (the `lab` extra). What it knows nothing about: how the figures came
about. Invariants: the picture says that it is simulated, of which trace, at which scale; lines are told apart without
colour vision (Okabe and Ito's set, dashes, markers).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.errors import ConfigError
from nanovllm.lab.allocation_plot import PNG_DPI, check_plot_path
from nanovllm.lab.cache_comparison import Comparison
from nanovllm.lab.clairvoyant import Clairvoyant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = (("#0072B2", "-", "o"), ("#999999", "--", "s"), ("#E69F00", "-.", "^"), ("#D55E00", "-", "D"),
          ("#56B4E9", ":", "v"), ("#009E73", "--", "P"), ("#CC79A7", "-.", "X"))  # fmt: skip
KNOWS_THE_FUTURE = ("#000000", "--", None)


def plot(found: Comparison, name: str, path: Path) -> None:
    """Draw to `path`. Raises ConfigError where it cannot be written."""
    check_plot_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanovllm"}):  # text stays text; same in, same out
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        hits, saved = figure.subplots(1, 2)
        _panel(hits, found, "token_hit_share", "hit tokens, % of prompt tokens", "found (simulated)")
        _panel(saved, found, "saved_share", "saved prefill time, %", "saved (estimated from a cost table)")
        handles, labels = hits.get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
        figure.suptitle(_title(found, name))
        try:
            figure.savefig(path, dpi=PNG_DPI, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"The plot {path} cannot be written: {error.strerror or error}.", param="plot") from error


def _title(found: Comparison, name: str) -> str:
    trace = found.trace
    scale = f", lengths /{trace.scale}" if trace.scale != 1 else ""
    return f"{name}: {len(trace.prompts):,} requests, {trace.num_distinct:,} distinct blocks{scale}"


def _panel(axes: Axes, found: Comparison, figure: str, label: str, title: str) -> None:
    capacities = found.capacities
    styles = iter(STYLES * (1 + len(found.policies) // len(STYLES)))
    for policy in found.policies:
        colour, dashes, marker = KNOWS_THE_FUTURE if policy == Clairvoyant.name else next(styles)
        shares = [100 * found.run(policy, capacity).as_dict()[figure] for capacity in capacities]
        axes.plot(capacities, shares, color=colour, linestyle=dashes, marker=marker, markersize=4, label=policy)
    most = 100 * found.infinite.as_dict()[figure]
    axes.axhline(most, color="#000000", linewidth=0.8, label="infinite")
    axes.set_xscale("log")
    axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
    axes.minorticks_off()
    axes.set_xlabel(f"capacity, blocks of {found.trace.block_tokens} tokens (log)")
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.08 * most if most else 1)
    axes.set_title(title)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
