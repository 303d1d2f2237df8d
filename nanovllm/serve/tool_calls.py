"""Reading calls back out of what the model writes, piece by piece.

What it is: a parser per style; `feed` takes text and gives what is certain by now,
`finish` the rest. What it knows nothing about: HTTP, tokens. Invariants: time is linear
in the text; the pieces do not depend on how the text was cut; what is not a well-formed
call of an offered function is content, as the model wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from nanovllm.serve.tools import CLOSING, MISTRAL_TAG, OPENING, PYTHON_TAG, ToolUse


@dataclass(frozen=True)
class Call:
    """A function and its arguments, a JSON object as text."""

    name: str
    arguments: str


Piece = str | Call


class CallParser(Protocol):
    """Text in, content and calls out."""

    def feed(self, text: str) -> list[Piece]:
        """What this text makes certain."""
        ...

    def finish(self) -> list[Piece]:
        """The text has ended: what was held back."""
        ...


def parser_for(use: ToolUse) -> CallParser:
    """The parser of a model's style."""
    names = frozenset(function.name for function in use.functions)
    return TaggedParser(names) if use.style.family == "hermes" else JsonParser(names, use.style.family == "mistral")


class TaggedParser:
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, anywhere in the text.

    White space around a call is dropped: it separates, and says nothing.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._space: list[str] = []  # outside a call: white space that may come before one
        self._held = ""  # and after it what may become an opening
        self._inside: list[str] | None = None  # within a call: its text so far
        self._tail = ""  # the end of that text, in which the closing may have begun
        self._is_after_call = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            text = self._outside(text, pieces) if self._inside is None else self._within(self._inside, text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        if self._inside is not None:  # never closed
            body, self._inside = "".join(self._inside), None
            return [self._read(body) or OPENING + body]
        held = self._take_space() + self._held
        self._held = ""
        return [held] if held else []

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        """Take in text up to an opening; what follows it is returned."""
        text, self._held = self._held + text, ""
        text = text.lstrip() if self._is_after_call else text
        at = text.find(OPENING)
        end = at if at >= 0 else len(text) - _overlap(text, OPENING)
        said = text[:end].rstrip()
        if said:
            pieces.append(self._take_space() + said)
            self._is_after_call = False
        self._space.append(text[len(said) : end])
        if at < 0:
            self._held = text[end:]
            return ""
        self._inside, self._tail = [], ""
        self._space.clear()
        return text[at + len(OPENING) :]

    def _take_space(self) -> str:
        """The white space that turned out to be text."""
        space, self._space = "".join(self._space), []
        return space

    def _within(self, inside: list[str], text: str, pieces: list[Piece]) -> str:
        """Take in text up to a closing; what follows it is returned."""
        window = self._tail + text
        at = window.find(CLOSING)
        inside.append(text)
        if at < 0:
            self._tail = window[-(len(CLOSING) - 1) :]
            return ""
        beyond = len(window) - at  # the closing and what follows it
        body = "".join(inside)
        body, rest = body[: len(body) - beyond], window[at + len(CLOSING) :]
        self._inside = None
        call = self._read(body)
        pieces.append(call or OPENING + body + CLOSING)
        self._is_after_call = call is not None
        return rest

    def _read(self, body: str) -> Call | None:
        values = list(_json_values(body))
        return _call(values[0], self._names) if len(values) == 1 else None


class JsonParser:
    """Calls as JSON that is the whole answer: `{"name": ..., "parameters": ...}`, or a list of such.

    An answer that begins like one is held back until its end.
    """

    def __init__(self, names: Collection[str], is_list: bool) -> None:
        self._names, self._is_list = names, is_list
        self._openings = (MISTRAL_TAG, "[") if is_list else (PYTHON_TAG, "{")
        self._held: list[str] = []
        self._start = ""  # the first letters; by them it is known what the text is
        self._is_call: bool | None = None

    def feed(self, text: str) -> list[Piece]:
        self._held.append(text)
        if self._is_call is None:
            self._start = (self._start + text if self._start else text.lstrip())[: len(PYTHON_TAG)]
            self._is_call = self._begins_call(self._start)
        return self._take() if self._is_call is False else []

    def finish(self) -> list[Piece]:
        text = "".join(self._held)
        calls = self._read(text) if self._is_call else []
        self._held = [] if calls else self._held
        return [*calls] if calls else self._take()

    def _take(self) -> list[Piece]:
        text, self._held = "".join(self._held), []
        return [text] if text else []

    def _begins_call(self, start: str) -> bool | None:
        """Whether the text is a call; None while that cannot be told."""
        if any(start.startswith(opening) for opening in self._openings):
            return True
        return None if any(opening.startswith(start) for opening in self._openings) else False

    def _read(self, text: str) -> list[Call]:
        values = list(_json_values(text.strip().removeprefix(self._openings[0])))
        if self._is_list:
            values = values[0] if len(values) == 1 and isinstance(values[0], list) else []
        calls = [_call(value, self._names) for value in values]
        return [call for call in calls if call is not None] if all(calls) else []


def _json_values(text: str) -> Iterator[Any]:
    """JSON values one after the other, white space and semicolons between them; None where it is not JSON."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    at = 0
    while at < len(text):
        if text[at].isspace() or (text[at] == ";" and at > 0):
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield None
            return
        yield value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _call(value: Any, names: Collection[str]) -> Call | None:
    """A decoded value as a call, if it is one."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = next(_json_values(arguments), None)
    if not isinstance(arguments, dict):
        return None
    try:
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):  # 1e400 was read as infinity
        return None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
