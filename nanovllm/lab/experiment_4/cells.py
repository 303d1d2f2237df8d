"""The capacity table as text: each cell of the sheet's columns from a row of tables.json.

What it is: formatting, one way, for results.csv, README.md and submission.md alike. What it
knows nothing about: files, languages: a cell has figures, units and English identifiers only.
Invariant: a cell is a pure function of its row, so that `check` can say what it has to be.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from nanovllm.lab.experiment_4.tables import COLUMNS

FIGURE_COLUMNS = COLUMNS[:-1]  # all but the explanation, which is prose


def cells(row: dict[str, Any]) -> list[str]:
    """The seven figures of a row, in the order of the columns."""
    live, kv = row["live_requests"], row["estimated_kv"]["per_request"]
    return [
        row["case"],
        " + ".join(str(length) for length in row["prompt_len"]["value"]),
        str(row["concurrency"]["value"]),
        f"mean {live['mean']:.2f} max {live['max']:.0f} (prefilling mean {live['prefilling_mean']:.2f} "
        f"max {live['prefilling_max']:.0f})",
        " + ".join(_size(size) for size in kv),
        _latency(row["TTFT"]),
        _latency(row["queue_wait"]),
    ]


def as_csv(rows: Sequence[dict[str, Any]], explanations: Sequence[str]) -> str:
    """results.csv."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*cells(row), text] for row, text in zip(rows, explanations, strict=True))
    return out.getvalue()


def as_markdown(rows: Sequence[dict[str, Any]], explanations: Sequence[str]) -> str:
    """The same for people."""
    lines = [*cells_header(), *(markdown_row([*cells(row), text]) for row, text in zip(rows, explanations))]
    return "\n".join(lines) + "\n"


def cells_header() -> list[str]:
    """The two lines that begin the table."""
    return [markdown_row(COLUMNS), "|" + "---|" * len(COLUMNS)]


def markdown_row(parts: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(parts) + " |"


def _size(size: dict[str, int]) -> str:
    block_exact, token_exact = (size[name] / 2**20 for name in ("block_exact_bytes", "token_exact_bytes"))
    return f"{block_exact:.3f} MiB = {size['blocks']} blocks (token-exact {token_exact:.3f} MiB)"


def _latency(figure: dict[str, Any]) -> str:
    return f"{figure['p50']:.1f} ms (P99 {figure['p99']:.1f})"
