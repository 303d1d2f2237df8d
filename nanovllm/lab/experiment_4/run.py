"""Experiment 4 carried out: every planned run recorded, every figure computed from the recordings.

What it is: the loop, and the order in which a bundle comes about. What it knows nothing
about: what a figure is, how anything is worded. Invariants: tables are made from the files
in raw/ and from nothing that was kept in memory, as `check` makes them; what fails leaves a
marked bundle; the warm-up is not recorded and its engine is gone before the first run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovllm.errors import ExecutionError
from nanovllm.lab.bundle import DIAGRAMS, RAW, TABLES, Bundle
from nanovllm.lab.environment import code_facts, environment, load_average, now
from nanovllm.lab.experiment_4 import report
from nanovllm.lab.experiment_4.cases import (
    ARMS,
    CASES,
    ENGINE,
    FULL,
    LAB_VERSION,
    QUICK,
    WARMUP,
    PlannedRun,
    Size,
    plan,
)
from nanovllm.lab.experiment_4.check import EXPERIMENT
from nanovllm.lab.experiment_4.engines import EngineSource, open_source
from nanovllm.lab.experiment_4.feed import feed
from nanovllm.lab.experiment_4.tables import header_facts, make_tables, read_runs
from nanovllm.lab.student_observer import Observation
from nanovllm.lab.workload_run import run_workload
from nanovllm.observe.prefix_trace import PrefixTraceWriter
from nanovllm.observe.recording_writer import JsonlWriter
from nanovllm.observe.wording import Lang

MAX_RAW_BYTES = 2**21  # of one recording


@dataclass(frozen=True)
class Settings:
    """What was asked for. Without a model everything is simulated."""

    model: str | None = "smollm2"
    quick: bool = False
    seed: int = 0
    repeats: int = 3
    lang: Lang = "en"
    num_threads: int | None = None

    @property
    def size(self) -> Size:
        """Lengths and pools."""
        return QUICK if self.quick else FULL

    @property
    def engine(self) -> dict[str, Any]:
        """Settings of every engine of the experiment."""
        return {**ENGINE, "seed": self.seed, "num_threads": self.num_threads}


def run_experiment(
    out: Path,
    settings: Settings,
    observation: Observation | None = None,
    *,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The whole experiment into the new folder `out`; returns its tables. Raises BundleError and what runs raise."""
    size = settings.size
    longest = size.long_len + size.output_len
    with ExitStack() as stack:
        bundle = stack.enter_context(Bundle(out, _facts(settings, command)))
        progress("loading the model" if settings.model else "virtual clock: every figure is simulated")
        source = stack.enter_context(open_source(settings.model, settings.engine, size.roomy_blocks, longest))
        bundle.facts["environment"] |= source.facts()
        _warm_up(source, size, settings.seed)
        for planned in (runs := plan(settings.repeats)):
            progress(f"run {planned.position} of {len(runs)}: {planned.arm} {planned.case}")
            _record(bundle, source, planned, settings, command)
            if observation is not None:
                observation.observe(
                    planned.name, feed(bundle.path(RAW), planned, settings.size, settings.seed, source.vocab)
                )
        bundle.facts["environment"]["load_average_after"] = load_average()
        bundle.facts["finished"] = now()
        return _conclude(bundle, runs, settings, observation)


def _facts(settings: Settings, command: str) -> dict[str, Any]:
    """What the manifest says beside what the recordings say themselves."""
    size = settings.size
    return {
        "experiment": EXPERIMENT,
        "lab_version": LAB_VERSION,
        "command": command,
        **code_facts(),
        "started": now(),
        "finished": None,
        "environment": environment(),
        "lang": settings.lang,
        "quick": settings.quick,
        "seed": settings.seed,
        "repeats": settings.repeats,
        "warmup": WARMUP,
        "order": [planned.as_dict() for planned in plan(settings.repeats)],
        "pools": {arm: size.pool(arm) for arm in ARMS},
        "size": vars(size),
        "engine": settings.engine,
    }


def _warm_up(source: EngineSource, size: Size, seed: int) -> None:
    """Kernels are compiled and pages touched before anything is measured."""
    small = replace(size, requests=2, output_len=4)
    engine = source.engine(size.roomy_blocks)
    for case in CASES[:2]:
        run_workload(engine, small.workload(case, seed, source.vocab))


def _record(bundle: Bundle, source: EngineSource, planned: PlannedRun, settings: Settings, command: str) -> None:
    """One run on a cold engine, into raw/. Raises ExecutionError where it is not whole."""
    size = settings.size
    engine = source.engine(size.pool(planned.arm))
    workload = size.workload(planned.case, settings.seed, source.vocab)
    header = source.header(engine, command)
    recording, prefixes = (bundle.path(f"{RAW}/{planned.name}{end}") for end in (".jsonl", ".prefixes.jsonl"))
    with (
        prefixes.open("w", encoding="utf-8", newline="\n") as file,
        JsonlWriter(engine.events, recording, header, max_bytes=MAX_RAW_BYTES) as writer,
    ):
        engine.observers.add(PrefixTraceWriter(file, engine.clock, header.block_size))
        run = run_workload(engine, workload, after_step=lambda outputs: writer.pump())
    failed = [final.request_id for final in run.finals.values() if final.error is not None]
    if run.refused or failed or writer.dropped or writer.omitted:
        lost = f"{len(run.refused)} refused, {len(failed)} failed, {writer.dropped + writer.omitted} events lost"
        raise ExecutionError(f"Run {planned.name} is not whole: {lost}.")


def _conclude(
    bundle: Bundle, runs: list[PlannedRun], settings: Settings, observation: Observation | None
) -> dict[str, Any]:
    """Tables, diagrams, prose, seal."""
    recorded = read_runs(bundle.folder, runs)
    bundle.facts["run"] = header_facts(recorded[0])
    tables = make_tables(recorded, settings.size)
    if observation is not None:
        tables["observer"] = {"source": f"{RAW}/observer.py", "name": observation.name, "reports": observation.reports}
        bundle.write(f"{RAW}/observer.py", observation.path.read_text(encoding="utf-8"))
    bundle.write_json(TABLES, tables)
    report.write(bundle, tables, recorded, settings.lang)
    bundle.facts["diagrams"] = sorted(path.name for path in bundle.path(DIAGRAMS).iterdir())
    bundle.finish()
    return tables
