"""From token ids to text, one token at a time, never a half character and never a half stop string.

What it is: the text side of one sequence. What it knows nothing about: scheduling.
Invariants: the concatenated increments are the text that is returned at the end;
a byte sequence that is not UTF-8 yet is held back until it is, or until the end; text
that may turn out to be the start of a stop string is held back until it is not.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

REPLACEMENT = "�"
MAX_HELD_TOKENS = 8  # a UTF-8 character has at most 4 bytes: more held tokens than this are no character


class Decoder(Protocol):
    """The part of a tokenizer this module needs."""

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str:
        """Text of a short list of ids."""
        ...


class IncrementalDetokenizer:
    """Decodes a sliding window: the last stable piece is kept as context, because decoding may depend on it."""

    def __init__(self, tokenizer: Decoder, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0  # [prefix, read) is context whose text is out already
        self._read = 0

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; often the token's own, sometimes none."""
        self._ids.append(token_id)
        before, text = self._texts()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_HELD_TOKENS:
            return ""
        return self._advance(before, text)

    def flush(self) -> str:
        """What is still held, as it stands: incomplete bytes become the replacement character."""
        return self._advance(*self._texts())

    def _texts(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[self._prefix : self._read], self._skip)
        return before, self._tokenizer.decode(self._ids[self._prefix :], self._skip)

    def _advance(self, before: str, text: str) -> str:
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(before) :]


class StopFilter:
    """Finds the earliest stop string in growing text and holds back what may become one."""

    def __init__(self, stops: Seq[str], *, include_stop: bool = False) -> None:
        self._stops, self._include = tuple(stops), include_stop
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The part of the text so far that is safe to show. After a match nothing more is."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        found = min(((at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            at, self.matched = found
            return self._held[: at + len(self.matched) if self._include else at]
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The end has come without a stop string: what was held is text."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
