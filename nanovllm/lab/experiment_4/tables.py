"""The tables of experiment 4, from its recordings.

What it is: the sheet's capacity table over the repeats of the base arm, total blocks, what
the probe saw, and the chain. What it knows nothing about: bundles' prose, who asks:
`lab run` writes what this returns, `lab check` compares with what this returns.
Invariants: it is a pure function of the files in raw/; every figure stands with its label,
its unit and the runs it is from; a median of three runs is shown with all three.

    live_requests  sequences that hold blocks: mean over time, and most at once; those still in prefill apart
    estimated_kv   one request's state in its last step: blocks x bytes of a block; beside it tokens x bytes of a token
    TTFT           arrival to the first token's hand-over
    queue_wait     T_queue: arrival to the start of the scheduling call that admits; a part of TTFT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nanovllm.lab.bundle import RAW
from nanovllm.lab.experiment_4.cases import CASES, PlannedRun, Size
from nanovllm.lab.experiment_4.chain import make_chain
from nanovllm.lab.experiment_4.figures import request_terms, run_figures
from nanovllm.lab.experiment_4.statement import make_statement
from nanovllm.observe.paths import Replay, replay
from nanovllm.observe.prefix_trace import probe_trace, read_prefix_trace
from nanovllm.observe.probe import PrefixProbe, total
from nanovllm.observe.recording import read_recording

COLUMNS = ("case", "prompt_len", "concurrency", "live_requests", "estimated_kv", "TTFT", "queue_wait", "解释")
MAX_RAW_BYTES = 2**23


@dataclass(frozen=True)
class RecordedRun:
    """One planned run, read back."""

    planned: PlannedRun
    replay: Replay
    overlap: dict[str, Any]  # what an observe-only probe makes of its prompts

    @property
    def figures(self) -> dict[str, Any]:
        """Its row of `runs`."""
        return {**self.planned.as_dict(), **run_figures(self.replay)}


def read_runs(folder: Path, runs: list[PlannedRun]) -> list[RecordedRun]:
    """The recordings of a bundle. Raises RecordingError, or InvalidRequestError for a trace."""
    return [read_run(folder, planned) for planned in runs]


def read_run(folder: Path, planned: PlannedRun) -> RecordedRun:
    """One of them."""
    recording = read_recording(folder / RAW / f"{planned.name}.jsonl", max_bytes=MAX_RAW_BYTES)
    block_size = recording.header.block_size
    probe = PrefixProbe([block_size], unit_tokens=block_size)
    probe_trace(read_prefix_trace(folder / RAW / f"{planned.name}.prefixes.jsonl"), probe, block_size)
    return RecordedRun(planned, replay(recording), total(probe.figures(), block_size).as_dict())


def header_facts(run: RecordedRun) -> dict[str, Any]:
    """What all runs have in common: the header but for the pool, which is the arm's."""
    return {name: value for name, value in vars(run.replay.recording.header).items() if name != "num_blocks"}


def make_tables(recorded: list[RecordedRun], size: Size) -> dict[str, Any]:
    """Every figure of the experiment as plain data."""
    rows = [run.figures for run in recorded]
    header = recorded[0].replay.recording.header
    table = [_row(case, _of(rows, "base", case), size, header.block_bytes // header.block_size) for case in CASES]
    return {
        "schema": 1,
        "experiment": 4,
        "label": header.label,
        "runs": rows,
        "columns": list(COLUMNS),
        "capacity_table": table,
        "total_blocks": _total_blocks(rows, header.label),
        "probe": _probe(recorded),
        "chain": make_chain(rows, {run.planned.name: request_terms(run.replay) for run in recorded}, table),
        "statement": make_statement(header.label),
        "observer": None,
    }


def _of(rows: list[dict[str, Any]], arm: str, case: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["arm"], row["case"]) == (arm, case)]


def _row(case: str, rows: list[dict[str, Any]], size: Size, token_bytes: int) -> dict[str, Any]:
    label, runs = rows[0]["label"], [row["run"] for row in rows]
    return {
        "case": case,
        "runs": runs,
        "prompt_len": {"value": rows[0]["prompt_len"], "unit": "tokens", "label": label},
        "concurrency": {"value": size.concurrency, "unit": "clients, one request each at a time", "label": label},
        "live_requests": {
            "mean": _median(rows, "live_requests", "mean"),
            "max": max(row["live_requests"]["max"] for row in rows),
            "prefilling_mean": _median(rows, "prefilling_requests", "mean"),
            "prefilling_max": max(row["prefilling_requests"]["max"] for row in rows),
            "unit": "requests that hold blocks",
            "label": label,
        },
        "estimated_kv": {
            "per_request": rows[0]["state_sizes"],
            "unit": "bytes",
            "label": "estimated",
            "formula": f"blocks x block_bytes; token-exact: tokens x {token_bytes} B",
            "bound": "block-exact less token-exact: the empty slots of the last block, under block_size tokens",
            "counted_error_blocks": max(row["estimate_error_blocks"] for row in rows),
        },
        "TTFT": _latency(rows, "ttft_ms", label),
        "queue_wait": _latency(rows, "queue_ms", label),
    }


def _latency(rows: list[dict[str, Any]], name: str, label: str) -> dict[str, Any]:
    medians = [row[name]["p50"] for row in rows]
    return {
        "p50": median(medians),
        "p99": _median(rows, name, "p99"),
        "p50_of_runs": medians,
        "spread": round(max(medians) - min(medians), 3),
        "unit": "ms",
        "label": label,
    }


def _median(rows: list[dict[str, Any]], name: str, part: str) -> float:
    return float(median(row[name][part] for row in rows))


def _total_blocks(rows: list[dict[str, Any]], label: str) -> dict[str, Any]:
    """The pool of the base arm, and how much of it each case had in use."""
    base = [row for row in rows if row["arm"] == "base"]
    used = {}
    for case in CASES:
        of_case = _of(base, "base", case)
        most = max(row["used_blocks"]["max"] for row in of_case)
        used[case] = {"mean": _median(of_case, "used_blocks", "mean"), "max": most}
    return {"pool": base[0]["num_blocks"], "used": used, "unit": "blocks", "label": label}


def _probe(recorded: list[RecordedRun]) -> dict[str, Any]:
    """Potential overlap of each case's prompts; the figures carry what they are."""
    first = [run for run in recorded if (run.planned.arm, run.planned.repeat) == ("base", 1)]
    return {run.planned.case: run.overlap for run in sorted(first, key=lambda run: CASES.index(run.planned.case))}
