"""What a comparison says: medians, ratios, the peers' settings, and who is missing and why."""

from __future__ import annotations

import statistics
from typing import Any

from peers.comparison import Record
from peers.engines import OURS, Engine
from peers.rows import Row


def document(rows: list[Row], record: Record) -> dict[str, Any]:
    """The JSON document. `rows.ROW.ratio.PEER` above 1 means that this engine is better, whatever the unit."""
    return {
        "label": "measured",
        "rows": {row.name: _row(row, record) for row in rows},
        "missing": record.missing,
        "failed": record.failed,
        "settings": record.settings,
        "engines": record.about,
        "runs": record.runs,
    }


def _row(row: Row, record: Record) -> dict[str, Any]:
    runs = record.runs.get(row.name, {})
    medians = {engine: _medians(figures) for engine, figures in runs.items()}
    mine = medians.get(OURS.name, {}).get(row.figure)
    ratios = {}
    for engine, figures in medians.items():
        if engine != OURS.name and mine is not None:
            theirs = figures[row.figure]
            ratios[engine] = round(mine / theirs if row.more_is_better else theirs / mine, 3)
    return {"what": row.what, "figure": row.figure, "unit": row.unit, "median": medians, "ratio": ratios}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(f"{statistics.median(run[name] for run in runs):.6g}") for name in runs[0]}


def print_report(rows: list[Row], engines: list[Engine], found: dict[str, Any]) -> None:
    """What a person reads: settings first, then one line a row."""
    for name, about in found["engines"].items():
        print(f"{name}: {', '.join(f'{key} {_text(value)}' for key, value in about.items())}")
    for name, reason in found["missing"].items():
        print(f"{name}: missing: {reason}")
    for row, reasons in found["failed"].items():
        print("\n".join(f"{row}: {name} failed: {reason}" for name, reason in reasons.items()))
    names = [engine.name for engine in engines]
    print(f"\n{'row':<22}{'unit':<7}" + "".join(f"{name:>14}" for name in names) + "   ratio to each peer")
    for row in rows:
        entry = found["rows"][row.name]
        cells = "".join(f"{_cell(entry, name):>14}" for name in names)
        print(f"{row.name:<22}{row.unit:<7}{cells}   {_text(entry['ratio'])}")
        for name, figures in entry["median"].items():
            more = {key: value for key, value in figures.items() if key != row.figure}
            if more:
                print(f"{'':<22}{name}: {_text(more)}")


def _cell(entry: dict[str, Any], name: str) -> str:
    figures = entry["median"].get(name)
    return "-" if figures is None else f"{figures[entry['figure']]:.4g}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_text(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
