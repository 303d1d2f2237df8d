"""Named segments: a prompt told as parts (system, document, question) instead of one string.

What it is: the data a caller hands in and the spans a sequence keeps. What it
knows nothing about: tokenizers. Invariant: the spans of a prompt are contiguous,
in order, and cover it whole.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """One named part of a prompt: text, or token ids where the caller has tokenized already."""

    name: str
    content: str | list[int]


@dataclass(frozen=True)
class SegmentSpan:
    """Where a segment lies in the token sequence: tokens [start, end)."""

    name: str
    start: int
    end: int
