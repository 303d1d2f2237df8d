"""Pictures of a run of experiment 4: whose state was where when, and what the pool's size changed.

What it is: two figures made with matplotlib (the `lab` extra), of the recordings and of the
chain. What it knows nothing about: how figures are computed. Invariants: every picture names
its label and the runs it shows; text is English, so that no font is needed for it; colours are told apart
without colour vision (Okabe and Ito); without matplotlib there are no pictures and nothing else changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.lab.experiment_4.cases import CASES
from nanovllm.lab.experiment_4.tables import RecordedRun
from nanovllm.observe.held_state import used_blocks
from nanovllm.observe.paths import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAIT, PREFILL, DECODE, POOL = "#BBBBBB", "#D55E00", "#0072B2", "#000000"
RESIDENCY, CHAIN = "residency.svg", "intervention.svg"


def draw(folder: Path, tables: dict[str, Any], recorded: list[RecordedRun]) -> None:
    """Both pictures into `folder`; none where matplotlib is missing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanovllm"}):  # text stays text; same in, same out
        for name, size, paint in ((RESIDENCY, (12, 6.4), _residency), (CHAIN, (11, 3.8), _interventions)):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure, tables, recorded)
            figure.savefig(folder / name, metadata={"Date": None})


def words(name: str, tables: dict[str, Any]) -> list[str]:
    """What stands written in a picture and tells of which run, pool and label it is."""
    if name == RESIDENCY:
        titles = [f"{case} (run {_first(tables, case)})" for case in CASES]
        return [*titles, _residency_title(tables), "waits (T_queue)", "blocks in use", "seconds"]
    chain = tables["chain"]
    found = [*chain["interventions"], chain["reverse"]]
    sides = [one[side] for one in found for side in ("small_pool", "large_pool")]
    pools = [text for side in sides for text in (side["arm"], f"{side['num_blocks']} blocks")]
    return [*(f"{one['case']}: {one['verdict']}" for one in found), *pools, f"ms, mean ({tables['label']})"]


def _first(tables: dict[str, Any], case: str) -> str:
    return next(str(run["run"]) for run in tables["runs"] if (run["arm"], run["case"]) == ("base", case))


def _residency_title(tables: dict[str, Any]) -> str:
    return f"Who waits, and who holds state ({tables['label']}); one pool of {tables['total_blocks']['pool']} blocks"


def _residency(figure: Figure, tables: dict[str, Any], recorded: list[RecordedRun]) -> None:
    """Above each request's wait and residency, below the blocks in use, for the first run of each case."""
    axes = figure.subplots(2, 3, height_ratios=(2.2, 1), sharex=True)
    first = {run.planned.case: run for run in recorded if (run.planned.arm, run.planned.repeat) == ("base", 1)}
    for column, case in enumerate(CASES):
        _lanes(axes[0, column], first[case])
        _used(axes[1, column], first[case], tables["total_blocks"]["pool"])
        axes[0, column].set_title(f"{case} (run {first[case].planned.name})", fontsize=10)
    axes[0, 0].set_ylabel("request, in order of arrival")
    axes[1, 0].set_ylabel("blocks in use")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(_residency_title(tables))


def _lanes(axes: Axes, run: RecordedRun) -> None:
    start_ns = run.replay.recording.start_ns
    kinds = {"waits": WAIT, "holds": DECODE, "prefills": PREFILL}  # prefill is drawn over the residency it is part of
    names = {"waits": "waits (T_queue)", "holds": "decodes, holding blocks", "prefills": "prefills, holding blocks"}
    for kind, colour in kinds.items():
        bars = [(row, span) for row, path in enumerate(run.replay.paths.values()) for span in getattr(path, kind)]
        rows = [row for row, _ in bars]
        widths, lefts = [_seconds(s) for _, s in bars], [(s.start_ns - start_ns) / 1e9 for _, s in bars]
        axes.barh(rows, widths, left=lefts, height=0.8, color=colour, label=names[kind])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _used(axes: Axes, run: RecordedRun, pool: int) -> None:
    start_ns, series = run.replay.recording.start_ns, used_blocks(run.replay)
    moments, amounts = [(level.at_ns - start_ns) / 1e9 for level in series], [level.amount for level in series]
    axes.fill_between(moments, amounts, step="post", color=DECODE, alpha=0.35)
    axes.axhline(pool, color=POOL, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.12 * pool)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)


def _seconds(span: Span) -> float:
    return span.length_ns / 1e9


def _interventions(figure: Figure, tables: dict[str, Any], recorded: list[RecordedRun]) -> None:
    """T_queue and T_prefill of the same requests on either pool."""
    chain = tables["chain"]
    found = [*chain["interventions"], chain["reverse"]]
    for axes, one in zip(figure.subplots(1, len(found), sharey=True), found):
        sides = [one["small_pool"], one["large_pool"]]
        names = [f"{side['arm']}\n{side['num_blocks']} blocks" for side in sides]
        queue, prefill = (
            [one[term][side] for side in ("small_pool", "large_pool")] for term in ("T_queue", "T_prefill")
        )
        axes.bar(names, prefill, color=PREFILL, label="T_prefill")
        axes.bar(names, queue, bottom=prefill, color=WAIT, label="T_queue")
        axes.set_title(f"{one['case']}: {one['verdict']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"ms, mean ({tables['label']})")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.suptitle("The same requests on a smaller and a larger pool")
