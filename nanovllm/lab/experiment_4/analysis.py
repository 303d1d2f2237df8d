"""The student's analysis: long enough, in words of some variety, with figures of the table, on the sheet's question.

What it is: counts over one text. What it knows nothing about: the other parts of a
submission. Invariants: nothing here judges whether the analysis is right; a text that repeats itself, cites nothing of
its own run, or leaves state, concurrency or waiting out is told so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from nanovllm.lab.experiment_4.cells import cells
from nanovllm.lab.findings import Finding

CHARACTERS = {"字": (500, 800), "words": (300, 550)}  # an English word stands for a little less than two characters
MIN_DISTINCT, MIN_FIGURES = 100, 2  # texts of these lengths have half as many again, or more
SCOPE = {
    "state": re.compile(r"状态|驻留|\bstate|\bresiden|\bKV\b", re.I),
    "concurrency": re.compile(r"并发|同时|concurren|at once|live requests", re.I),
    "waiting": re.compile(r"等待|排队|wait|queue", re.I),
}
IDEOGRAPH = re.compile(r"[\u3400-\u9fff]")
WORD = re.compile(r"[A-Za-z0-9]+(?:[._'-][A-Za-z0-9]+)*")
NUMBER = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
MEASURED = slice(3, None)  # columns whose figures a run gives: not the case, its lengths, its clients


def check_analysis(where: str, text: str, rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Every rule that the analysis breaks. `rows` are those of the capacity table."""
    count, unit = count_characters(text)
    low, high = CHARACTERS[unit]
    if not low <= count <= high:
        yield Finding("analysis", where, f"{count} {unit}", f"{low}-{high} {unit}")
    distinct = len({*IDEOGRAPH.findall(text), *(word.lower() for word in WORD.findall(text))})
    if count >= low and distinct < MIN_DISTINCT:
        yield Finding("analysis", where, f"{distinct} distinct {unit}", f"{MIN_DISTINCT}")
    if (cited := len(figures_cited(text, rows))) < MIN_FIGURES:
        yield Finding("figures", where, str(cited), str(MIN_FIGURES))
    for name, pattern in SCOPE.items():
        if not pattern.search(text):
            yield Finding("scope", where, f"why_{name}")


def count_characters(text: str) -> tuple[int, str]:
    """How long a text is: in 字 (ideographs, and words and numbers as one each), or in words where they prevail."""
    ideographs, words = len(IDEOGRAPH.findall(text)), len(WORD.findall(text))
    return (ideographs + words, "字") if ideographs >= words else (words, "words")


def figures_cited(text: str, rows: Sequence[dict[str, Any]]) -> set[float]:
    """Numbers in `text` that are figures of the table's runs, rounded or in thousands; small whole numbers aside."""
    told = [float(number) for row in rows for cell in cells(row)[MEASURED] for number in NUMBER.findall(cell)]
    found = set()
    for number in NUMBER.findall(text):
        value, places = float(number.replace(",", "")), len(number.partition(".")[2])
        if places or value >= 10:
            near = 0.5000001 * 10.0**-places
            found |= {value for one in told if min(abs(one - value), abs(one / 1000 - value)) <= near}
    return found
