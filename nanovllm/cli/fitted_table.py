"""A table that fits the terminal: headers wrap, then columns move to a table below. No figure is ever cut.

What it is: columns of ready text as lines. What it knows nothing about: what they say. Invariants: every cell stands
whole on one line, every header whole in words (a hyphen may end a line); each further table begins with the first
column again. A terminal narrower than the first column and one other gets lines as long as these two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A header and its cells; the first column of a table is its labels, to the left, the others stand to the right."""

    header: str
    cells: Sequence[str]

    def natural(self) -> int:
        """Width that wraps nothing."""
        return max(len(text) for text in (self.header, *self.cells))

    def least(self, *, labels: bool = False) -> int:
        """Width that cuts nothing; labels may wrap as headers do."""
        return max(_least(self.header), *(_least(cell) if labels else len(cell) for cell in self.cells))


def fitted(columns: Sequence[Column], width: int, gap: int = 2) -> Iterator[str]:
    """The lines of as many tables as it takes, with an empty line between two."""
    labels, *others = columns
    if sum(column.natural() + gap for column in columns) - gap <= width:
        yield from _table(columns, [column.natural() for column in columns], gap)
        return
    first = True
    for group in _groups(others, width - labels.least(labels=True), gap):
        widths = [column.least() for column in group]
        room = width - sum(widths) - gap * len(group)
        if not first:
            yield ""
        first = False
        label_width = max(labels.least(labels=True), min(labels.natural(), room))
        yield from _table([labels, *group], [label_width, *widths], gap)


def _groups(columns: Sequence[Column], room: int, gap: int) -> Iterator[list[Column]]:
    """Neighbours that fit together, at least one at a time."""
    group: list[Column] = []
    for column in columns:
        if group and sum(one.least() + gap for one in (*group, column)) > room:
            yield group
            group = []
        group.append(column)
    if group:
        yield group


def _table(columns: Sequence[Column], widths: Sequence[int], gap: int) -> Iterator[str]:
    headers = [_wrapped(column.header, width) for column, width in zip(columns, widths)]
    tall = max(map(len, headers))
    for line in zip(*([""] * (tall - len(header)) + header for header in headers)):
        yield _line(line, widths, gap)
    for label, *cells in zip(*(column.cells for column in columns)):
        *before, last = _wrapped(label, widths[0])
        yield from before
        yield _line([last, *cells], widths, gap)


def _line(cells: Sequence[str], widths: Sequence[int], gap: int) -> str:
    label, *others = cells
    rest = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
    return (" " * gap).join([label.ljust(widths[0]), *rest]).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    """In lines of at most `width` that keep the text's indent; a single word is longer rather than cut."""
    indent, pieces = _pieces(text)
    lines = [indent]
    for piece in pieces:
        if lines[-1] != indent and len((lines[-1] + piece).rstrip()) > width:
            lines.append(indent)
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _least(text: str) -> int:
    """The width of its longest piece."""
    indent, pieces = _pieces(text)
    return len(indent) + max(len(piece.rstrip()) for piece in pieces)


def _pieces(text: str) -> tuple[str, list[str]]:
    """The indent, and what no line may cut: each ends with a space, a hyphen or the text."""
    words = text.lstrip()
    return text[: len(text) - len(words)], re.split(r"(?<=-)|(?<= )", words)
