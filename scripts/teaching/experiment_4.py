"""What the pack of experiment 4 takes from code: cases, columns, symbols, statements.

What it is: the values of the placeholders in `course/sources/experiment_4/`. What it knows nothing about: languages,
files of a pack. Invariant: a fact that the lab knows is never written into the prose.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanovllm.lab.experiment_4 import check, submission
from nanovllm.lab.experiment_4.cases import ARMS, CASES, FULL, MIN_REPEATS, QUICK, Size
from nanovllm.lab.experiment_4.run import LAB_VERSION
from nanovllm.lab.experiment_4.tables import COLUMNS
from nanovllm.observe.probe import STATEMENT

FOLDER = "experiment_4_KV状态与缓存组织实验"
STARTERS = ("state_counter", "prefix_probe")
READ = ("nanovllm/engine/block_manager.py::BlockManager", "nanovllm/engine/sequence.py::Sequence")
TASKS = {
    1: (
        "nanovllm/engine/llm_engine.py::LLMEngine.step",
        "nanovllm/engine/scheduler.py::Scheduler.schedule",
        "nanovllm/engine/kv_state.py::DeviceState",
        "nanovllm/engine/block_manager.py::BlockManager.allocate",
    ),
    2: ("nanovllm/lab/experiment_4/cases.py::Size", "nanovllm/observe/capacity.py::Pool.concurrency"),
    3: ("nanovllm/lab/experiment_4/chain.py::make_chain", "nanovllm/engine/scheduler.py::Scheduler"),
    4: ("nanovllm/lab/student_observer.py::StateObserver",),
}
EXERCISE = "nanovllm/engine/block_manager.py"
SYMBOLS = (*READ, *(symbol for symbols in TASKS.values() for symbol in symbols))


def values(term: str) -> dict[str, str]:
    """Placeholder -> text."""
    return {
        "term": term,
        "lab_version": str(LAB_VERSION),
        "folder": f"course/experiments/{FOLDER}/assignment_{term}",
        "exercise": EXERCISE,
        "symbols_read": listed(READ),
        **{f"symbols_task_{task}": listed(symbols) for task, symbols in TASKS.items()},
        "sizes": sizes(),
        "repeats": str(MIN_REPEATS),
        "capacity_table": table(COLUMNS, [[case] for case in CASES]),
        "probe_statement": STATEMENT,
        "rules_bundle": listed(check.RULES),
        "rules_submission": listed(submission.RULES),
    }


def listed(symbols: Iterable[str]) -> str:
    """As code, in a row."""
    return ", ".join(f"`{symbol}`" for symbol in symbols)


def sizes() -> str:
    """Lengths, requests and pools of the three cases, with `--quick` and without."""
    columns = ("case", "prompt_len", "output", "requests", "concurrency", *(f"{arm} pool, blocks" for arm in ARMS))
    rows = [row for size, flag in ((FULL, ""), (QUICK, " (--quick)")) for row in rows_of(size, flag)]
    return table(columns, rows)


def rows_of(size: Size, flag: str) -> list[list[str]]:
    """One row a case."""
    lengths = {"short_ctx": f"{size.short_len}", "long_ctx": f"{size.long_len}"}
    numbers = (size.output_len, size.requests, size.concurrency, *(size.pool(arm) for arm in ARMS))
    return [
        [f"{case}{flag}", lengths.get(case, f"{size.short_len} + {size.long_len}"), *map(str, numbers)]
        for case in CASES
    ]


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table in Markdown; what a row lacks is left empty."""
    lines = [columns, ["---"] * len(columns), *(row + [""] * (len(columns) - len(row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
