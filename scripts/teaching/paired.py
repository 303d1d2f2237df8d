"""Paired text: one source for both languages, so that neither can say what the other does not.

What it is: a splitter. A line `<!-- en -->` begins English, the `<!-- zh -->` that must follow
it the same in Chinese, `<!-- both -->` what stands in either: tables, code, columns, names.
`{{name}}` is filled in from code. What it knows nothing about: sheets, packs.

Invariants: every English part has a Chinese one; headings, table rows and fenced blocks of the two
agree in number; a placeholder that nobody fills is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LANGUAGES = ("en", "zh")
_MARK = re.compile(r"^<!-- (en|zh|both) -->\n", re.MULTILINE)
_SHAPE = {"headings": r"^#+ ", "table rows": r"^\|", "fences": r"^```", "items": r"^ *(?:-|\d+\.) "}


def split(source: str, values: Mapping[str, str]) -> dict[str, str]:
    """The text in each language. Raises ValueError where the languages do not match."""
    pieces = _MARK.split(source)
    marks = list(zip(pieces[1::2], pieces[2::2], strict=True))
    if pieces[0].strip() or not marks:
        raise ValueError("a paired text begins with a mark")
    _check_pairs(marks)
    return {
        lang: _filled("".join(text for mark, text in marks if mark in (lang, "both")), values) for lang in LANGUAGES
    }


def _check_pairs(marks: list[tuple[str, str]]) -> None:
    for i, (mark, text) in enumerate(marks):
        follows = marks[i + 1] if i + 1 < len(marks) else ("", "")
        if (mark == "en") != (follows[0] == "zh") or (mark == "zh" and i == 0):
            raise ValueError(f"en and zh do not alternate at: {text[:60]!r}")
        if mark == "en":
            for name, pattern in _SHAPE.items():
                counts = [len(re.findall(pattern, one, re.MULTILINE)) for one in (text, follows[1])]
                if counts[0] != counts[1]:
                    raise ValueError(f"{counts[0]} {name} in English, {counts[1]} in Chinese, at: {text[:60]!r}")


def _filled(text: str, values: Mapping[str, str]) -> str:
    """With every placeholder's value. Raises ValueError where one has none."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"nothing is known as {match[0]}")
        return values[match[1]]

    return re.sub(r"\{\{(\w+)\}\}", value, text)
