"""The replays as a picture: concurrency over time, and what every slot was used for.

What it is: two panels, made with matplotlib (the `lab` extra). What it knows nothing about:
how the figures came about. Invariants: the picture says that it is simulated, of which workload, and in which unit;
colours are told apart without colour vision (Okabe and Ito's set), the lines by their dashes too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ConfigError
from nanovllm.lab.allocation_replay import KINDS, Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
LINES = (("#D55E00", "-"), ("#0072B2", "--"), ("#CC79A7", ":"), ("#000000", "-"), ("#009E73", "-."))
KIND_COLOURS = ("#009E73", "#F0E442", "#D55E00", "#CC79A7", "#56B4E9", "#DDDDDD")
KIND_NAMES = (
    "used",
    "reserved for later",
    "internal fragmentation",
    "external fragmentation",
    "kept as headroom",
    "free",
)
SHOWN_AS = {"reserve-exact": "reserve-exact (oracle)"}  # it is told what no allocator in use can know
LEGEND: Mapping[str, Any] = MappingProxyType(
    {"frameon": False, "fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
)  # below its panel: no line or figure lies under it
PNG_DPI = 130


def check_plot_path(path: Path) -> None:
    """Raises ConfigError where the file's kind is not one of FORMATS, or matplotlib is missing."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"plot must end in {' or '.join(FORMATS)}, not {path.suffix!r}.", param="plot")
    try:
        import matplotlib  # noqa: F401  its import is the question
    except ImportError:
        hint = 'Install it: python -m pip install "matplotlib>=3.9".'
        raise ConfigError("A plot needs the package matplotlib.", param="plot", hint=hint) from None


def plot(replays: Sequence[Replay], document: dict[str, Any], path: Path) -> None:
    """Draw to `path`. Raises ConfigError where it cannot be written."""
    check_plot_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanovllm"}):  # text stays text; same in, same out
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        over_time, slots = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _concurrency(over_time, replays)
        _slots(slots, replays)
        figure.suptitle(_title(document))
        try:
            figure.savefig(path, dpi=PNG_DPI, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"The plot {path} cannot be written: {error.strerror or error}.", param="plot") from error


def _title(document: dict[str, Any]) -> str:
    work = document["workload"]
    return f"{work['name']}, {work['requests']} requests, {document['capacity_tokens']:,} token slots (simulated)"


def _concurrency(axes: Axes, replays: Sequence[Replay]) -> None:
    end = _shown_ticks([len(one.samples) for one in replays])
    for (colour, dashes), one in zip(LINES, replays, strict=True):
        live = [sample.live for sample in one.samples]
        name = SHOWN_AS.get(one.allocator, one.allocator)
        name += "" if len(live) <= end else f" (goes on to {len(live):,})"
        axes.step(range(len(live) + 1), [*live, 0], where="post", color=colour, linestyle=dashes, label=name)
    axes.set_xlabel("tick (one decode step)")
    axes.set_ylabel("requests that hold KV")
    axes.set_title("achieved concurrency")
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.05 * max(sample.live for one in replays for sample in one.samples))
    axes.legend(ncols=2, **LEGEND)
    axes.spines[["top", "right"]].set_visible(False)


def _shown_ticks(lengths: Sequence[int]) -> int:
    """Where the time axis ends: an allocator that takes far longer than the others does not squeeze them."""
    *others, longest = sorted(lengths)
    return min(longest, round(1.25 * others[-1])) if others else longest


def _slots(axes: Axes, replays: Sequence[Replay]) -> None:
    """One bar an allocator, over the ticks at which somebody waits: there every slot counts."""
    rows = [one.summary() for one in replays]
    shares = [row["shares_while_somebody_waits"] or row["shares"] for row in rows]
    left = [0.0] * len(rows)
    names = [
        f"{SHOWN_AS.get(row['allocator'], row['allocator'])}\n{row['failed_admissions']:,} failed admissions"
        for row in rows
    ]
    for kind, colour, name in zip(KINDS, KIND_COLOURS, KIND_NAMES, strict=True):
        widths = [100 * share[kind] for share in shares]
        bars = axes.barh(names, widths, left=left, color=colour, edgecolor="white", label=name)
        axes.bar_label(bars, [f"{w:.0f}" if w >= 5 else "" for w in widths], label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of token slots while somebody waits, mean")
    axes.set_title("what the slots are used for")
    axes.legend(ncols=3, **LEGEND)
    axes.spines[["top", "right"]].set_visible(False)
