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
MAX_HELD_TOKENS = 8  # a UTF-8 character has at most 4 bytes: more held tokens than this are no character,
MAX_TAIL_TOKENS = 3  # except perhaps the last of them, which may have begun one


class Decoder(Protocol):
    """The part of a tokenizer this module needs."""

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str:
        """Text of a short list of ids."""
        ...


class PieceMemory:
    """A decoder that remembers what it made of single tokens: the context of nearly every increment is one."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[tuple[int, bool], str] = {}

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str:
        """As the tokenizer does."""
        if len(ids) != 1:
            return self._tokenizer.decode(ids, skip_special_tokens)
        key = (ids[0], skip_special_tokens)
        piece = self._pieces.get(key)
        if piece is None:
            piece = self._pieces[key] = self._tokenizer.decode(ids, skip_special_tokens)
        return piece


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
        end = len(self._ids)
        text = self._text(end)
        if text.endswith(REPLACEMENT):
            if end - self._read < MAX_HELD_TOKENS:
                return ""
            end -= MAX_TAIL_TOKENS
            text = self._text(end)
        return self._advance(end, text)

    def flush(self) -> str:
        """What is still held, as it stands: incomplete bytes become the replacement character."""
        return self._advance(len(self._ids), self._text(len(self._ids)))

    def _text(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._prefix : end], self._skip)

    def _advance(self, end: int, text: str) -> str:
        before = self._text(self._read)
        self._prefix, self._read = self._read, end
        return text[len(before) :]


class StopFilter:
    """Finds the stop string that is complete first, however the text comes in; holds back what may become one."""

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
        places = ((at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0)
        found = min(places, default=None)
        if found is not None:
            _, at, self.matched = found
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
