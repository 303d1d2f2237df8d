"""The files of a bundle that people read (being written)."""

from __future__ import annotations

from typing import Any

from nanovllm.lab.bundle import Bundle
from nanovllm.lab.experiment_4.tables import RecordedRun
from nanovllm.observe.wording import Lang


def write(bundle: Bundle, tables: dict[str, Any], recorded: list[RecordedRun], lang: Lang) -> None:
    """README.md, results.csv, notes.md, submission.md and the diagrams."""
