"""What a program wrote for people, made again: README.md, the explanations of results.csv, the diagrams.

What it is: rules generated and diagram. What it knows nothing about: what a person may
change (notes.md, submission.md). Invariants: texts and the lifecycle diagram have to be equal to the last character;
of matplotlib's pictures, which differ from version to version, every word has to stand in them: their shapes are
not compared.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from html import unescape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nanovllm.lab.bundle import DIAGRAMS, README, RESULTS
from nanovllm.lab.experiment_4.plots import CHAIN, RESIDENCY, words
from nanovllm.lab.experiment_4.report import LIFECYCLE
from nanovllm.lab.findings import Finding

LIFECYCLES = tuple(f"{LIFECYCLE}.{end}" for end in ("mmd", "svg"))
MAX_PICTURE_BYTES = 2**22
MARKUP = re.compile(r"<[^>]*>")


def check_prose(found: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[Finding]:
    """README.md line by line, and the last column of results.csv."""
    for number, (ours, right) in enumerate(zip_longest(*(t[README].splitlines() for t in (found, wanted)))):
        if ours != right:
            yield Finding("generated", f"{README}, line {number + 1}", _short(ours), _short(right))
            break
    columns = [[row[-1] if row else "" for row in csv.reader(io.StringIO(t[RESULTS]))] for t in (found, wanted)]
    for number, (ours, right) in enumerate(zip_longest(*columns)):
        if number and ours != right:
            yield Finding("generated", f"{RESULTS} 解释, row {number}", _short(ours), _short(right))


def check_diagrams(
    folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, str], tables: dict[str, Any]
) -> Iterator[Finding]:
    """The lifecycle diagram, twice, and the pictures that the manifest says were drawn."""
    drawn = manifest["diagrams"]
    yield from (Finding("diagram", f"{DIAGRAMS}/{name}") for name in LIFECYCLES if name not in drawn)
    for name in drawn:
        where, text = f"{DIAGRAMS}/{name}", _read(folder, name)
        if text is None:
            yield Finding("diagram", where)
        elif name in LIFECYCLES:
            if text != wanted[where]:
                yield Finding("diagram", where, "another text")
        elif name in (RESIDENCY, CHAIN):
            shown = unescape(MARKUP.sub("\n", text))
            absent = [word for word in words(name, tables) if word not in shown]
            if absent or "<path" not in text:
                yield Finding("diagram", where, "without", ", ".join(absent[:3]) or "a shape")
        else:
            yield Finding("diagram", where, "no diagram of this experiment")


def _read(folder: Path, name: str) -> str | None:
    path = folder / DIAGRAMS / name
    try:
        if path.parent != folder / DIAGRAMS or path.stat().st_size > MAX_PICTURE_BYTES:
            return None
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError):
        return None


def _short(text: str | None) -> str:
    return "(missing)" if text is None else text if len(text) <= 160 else f"{text[:157]}..."
