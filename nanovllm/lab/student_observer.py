"""A student's observer: shown everything a run recorded, asked for its figures at the end.

What it is: loading `FILE.py:NAME` and the feed. What it knows nothing about: what is
counted, and whether it is right (`experiment_4/reference.py`). Invariants: it is fed from the
recording after the run, so it can neither delay nor change what it observes; one instance
a run; one that raises ends the command with a sentence naming its line.

    class MyCounter:                        # NAME: a class, or a function that returns an object
        def on_event(self, event): ...      # each line of raw/RUN.jsonl as a dict, in order; and after each
                                            # `entered` {"record": "prompt", "request_id", "ts_ns", "token_ids"}
        def report(self): ...               # {"kind": "state_counter" | "prefix_probe", figure: number, ...}

The first event is the header (`block_size`, `num_blocks`, `block_bytes`), the last the record `end`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nanovllm.errors import InvalidRequestError

KINDS = ("state_counter", "prefix_probe")
MAX_FIGURES = 100


class StateObserver(Protocol):
    """What a student writes."""

    def on_event(self, event: dict[str, Any]) -> None:
        """One record of the run."""

    def report(self) -> dict[str, Any]:
        """The figures at the end."""


class Observation:
    """One observer's source and what its instances reported, by run."""

    def __init__(self, given: str) -> None:
        """`given` is FILE.py:NAME. Raises InvalidRequestError where that cannot be loaded."""
        file, _, self.name = given.rpartition(":")
        self.path = Path(file)
        self._make = _load(self.path, self.name)
        self.reports: dict[str, dict[str, Any]] = {}

    def observe(self, run: str, events: Iterable[dict[str, Any]]) -> None:
        """Show `events` to a fresh instance and keep its report. Raises InvalidRequestError where it fails."""
        try:
            observer = self._make()
            for event in events:
                observer.on_event(event)
            report = observer.report()
        except Exception as error:  # a student's code may raise anything: it gets a sentence
            raise self._failure(run, error) from error
        self.reports[run] = _checked(report)

    def _failure(self, run: str, error: Exception) -> InvalidRequestError:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == self.path.resolve()]
        where = f", line {lines[-1]}" if lines else ""
        what = f"{type(error).__name__}: {error}"
        return InvalidRequestError(f"{self.path.name}:{self.name}{where} failed on {run}: {what}.", param="observer")


def _load(path: Path, name: str) -> Callable[[], StateObserver]:
    if path.suffix != ".py" or not path.is_file() or not name.isidentifier():
        hint = "Give --observer FILE.py:NAME, NAME a class with on_event and report."
        raise InvalidRequestError(f"There is no observer {path}:{name}.", param="observer", hint=hint)
    spec = importlib.util.spec_from_file_location(f"nanovllm_observer_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # as above
        what = f"{type(error).__name__}: {error}"
        raise InvalidRequestError(f"{path.name} cannot be imported: {what}.", param="observer") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InvalidRequestError(f"{path.name} has no class or function {name}.", param="observer")
    return found


def _checked(report: object) -> dict[str, Any]:
    """The report as plain data. Raises InvalidRequestError where it is none."""
    try:
        whole = json.loads(json.dumps(report, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        whole = None
    if not isinstance(whole, Mapping) or whole.get("kind") not in KINDS or len(whole) > MAX_FIGURES:
        hint = f'It must be {{"kind": "{KINDS[0]}" or "{KINDS[1]}", figure: number, ...}}.'
        raise InvalidRequestError("The observer's report cannot be used.", param="observer", hint=hint)
    return dict(whole)
