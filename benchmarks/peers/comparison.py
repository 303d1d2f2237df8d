"""The order of visits, what they measured so far, and a file that keeps it.

What it knows nothing about: how an engine runs, how a table looks. Invariants: each repeat visits every engine once per
group of rows, forwards and backwards in turn; an engine that fails is missing with its reason, and never guessed; what
is in the file is not measured again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.engines import OURS, Engine, Missing
from peers.rows import Figures, Row

CAPPED = (OURS.name, "transformers")  # who can be capped by the two variables


@dataclass
class Record:
    """All that was measured. `runs[row][engine]` holds one entry per repeat."""

    settings: dict[str, Any]
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def count(self, row: str, engine: str) -> int:
        """Repeats measured so far."""
        return len(self.runs.get(row, {}).get(engine, []))

    def add(self, row: str, engine: str, figures: Figures) -> None:
        """One more repeat."""
        self.runs.setdefault(row, {}).setdefault(engine, []).append(figures)

    def save(self, path: Path | None) -> None:
        """Whole or not at all."""
        if path is not None:
            scratch = path.with_name(f"{path.name}.{os.getpid()}")
            scratch.write_text(json.dumps(vars(self)), encoding="utf-8")
            os.replace(scratch, path)

    @classmethod
    def load(cls, path: Path | None, settings: dict[str, Any]) -> Record:
        """What an interrupted run left; a run with other settings is refused."""
        if path is None or not path.exists():
            return cls(settings)
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise SystemExit(f"{path} is not what --resume wrote: {error}") from error
        if record.settings != settings:
            raise SystemExit(f"{path} is of a run with other settings: {record.settings}")
        record.missing, record.failed = {}, {}  # they get another try
        return record


# An engine's visit: (engine, is_capped) -> something that measures rows
Visit = Callable[[Engine, bool], AbstractContextManager[Any]]


def compare(
    rows: list[Row],
    engines: list[Engine],
    repeats: int,
    record: Record,
    visit: Visit,
    measure: Callable[[Any, Row, int], Figures],
    path: Path | None = None,
) -> None:
    """Fill `record`. `visit` opens an engine, `measure` runs one row of it."""
    if any(row.name == "start_up" for row in rows):
        for engine in engines:
            _first_start(engine, rows, repeats, record, visit)
    for repeat, is_capped, engine in order(engines, repeats):
        due = [row for row in rows if row.is_capped == is_capped and is_due(row, engine, repeat, record)]
        if due and engine.name not in record.missing:
            _visit(engine, is_capped, due, repeat, record, visit, measure, path)
    record.save(path)


def order(engines: list[Engine], repeats: int) -> Iterator[tuple[int, bool, Engine]]:
    """(repeat, capped, engine) of each possible visit."""
    for repeat in range(repeats):
        for is_capped in (False, True):
            yield from ((repeat, is_capped, e) for e in (engines if repeat % 2 == 0 else reversed(engines)))


def is_due(row: Row, engine: Engine, repeat: int, record: Record) -> bool:
    """Whether the engine runs this row at all, and has not yet in this repeat."""
    if row.is_capped and engine.name not in CAPPED:
        return False
    return record.count(row.name, engine.name) <= repeat and engine.name not in record.failed.get(row.name, {})


def _first_start(engine: Engine, rows: list[Row], repeats: int, record: Record, visit: Visit) -> None:
    """Compiles and fills the caches; not measured."""
    if record.count("start_up", engine.name) >= repeats:
        return
    print(f"first start of {engine.name}, not measured ...", file=sys.stderr)
    try:
        with visit(engine, False):
            pass
    except Missing as error:
        record.missing[engine.name] = str(error)


def _visit(
    engine: Engine,
    is_capped: bool,
    rows: list[Row],
    repeat: int,
    record: Record,
    visit: Visit,
    measure: Callable[[Any, Row, int], Figures],
    path: Path | None,
) -> None:
    try:
        with visit(engine, is_capped) as worker:
            record.about[f"{engine.name} capped" if is_capped else engine.name] = worker.about
            for row in rows:
                print(f"repeat {repeat + 1}, {engine.name}, {row.name} ...", file=sys.stderr)
                try:
                    record.add(row.name, engine.name, measure(worker, row, repeat))
                except ValueError as error:  # this row of this engine, and no other
                    record.failed.setdefault(row.name, {})[engine.name] = str(error)
                record.save(path)
    except Missing as error:
        record.missing[engine.name] = str(error)
