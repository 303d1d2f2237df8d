"""A bundle: one folder that holds a run's evidence, and says whether the run was whole.

What it is: the layout that all experiments share, and the writer that keeps to it. What it
knows nothing about: what is measured. Invariants: a folder that holds anything is never
written into; a run that failed keeps what it had and is marked; while the run goes on its
manifest says `running`, so a run that was killed cannot pass for a whole one.

    README.md       what was asked, with what command, on what, and what came out
    results.csv     the sheet's table, its columns and no others
    notes.md        anomalies and failures; the reader may add to it
    submission.md   the sheet's template, figures filled in, prose to be written by the student
    raw/            one recording a run, JSON lines; the student's observer, where there was one
    diagrams/       pictures, each with the name of the run it shows
    tables.json     every figure, with label, unit and the runs it is from
    manifest.json   what ran, where, on which commit, and SHA-256 of every other file
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import BundleError
from nanovllm.lab.manifest import seal, write_manifest

README, RESULTS, NOTES, SUBMISSION = "README.md", "results.csv", "notes.md", "submission.md"
TABLES, RAW, DIAGRAMS = "tables.json", "raw", "diagrams"
PROSE = (NOTES, SUBMISSION)  # whose text may change after the run
PARTS = (README, RESULTS, NOTES, SUBMISSION, RAW, DIAGRAMS, TABLES, "manifest.json")


class Bundle:
    """A bundle that is being written. As a context: an exception marks it failed and goes on."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Makes the folder. `facts` go into the manifest. Raises BundleError where something lies there already."""
        self.folder, self.facts = folder, facts
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                hint = "A run is never overwritten: name another folder."
                raise BundleError(f"{folder} is not empty.", param="out", hint=hint)
            for part in (RAW, DIAGRAMS):
                (folder / part).mkdir(parents=True)
            self._write_manifest("running")
        except OSError as error:
            raise BundleError(f"{folder} cannot be written: {error.strerror or error}.", param="out") from error

    def path(self, name: str) -> Path:
        """Where a file of it lies."""
        return self.folder / name

    def write(self, name: str, text: str) -> None:
        """Write one file."""
        self.path(name).write_text(text, encoding="utf-8", newline="\n")

    def write_json(self, name: str, document: Any) -> None:
        """Write one JSON document, for people too."""
        self.write(name, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def finish(self) -> None:
        """Everything is there: seal it."""
        self._write_manifest("ok")

    def fail(self, error: BaseException) -> None:
        """Keep what there is, and say that and why the run failed."""
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if not self.path(NOTES).exists():
            self.write(NOTES, f"# FAILED\n\n{what}\n")
        self._write_manifest("failed", what)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(error)

    def _write_manifest(self, status: str, error: str | None = None) -> None:
        document = {"schema": 1, "status": status, "error": error, **self.facts, "prose": list(PROSE)}
        write_manifest(self.folder, seal(self.folder, document))
