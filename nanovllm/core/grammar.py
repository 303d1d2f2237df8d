"""Grammar: what a generated text must look like, as plain data that is checked when it is made.

What it is: a kind and a text. What it knows nothing about: how grammars are compiled,
tokenizers, the engine. Invariants: an instance is within the limits (64 KiB, nesting 32),
so nothing that recurses over one runs out of stack; equal grammars are equal values, which
is what makes them a cache's keys. Whether a text is a sound grammar, its compiler says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError, shown

MAX_BYTES, MAX_DEPTH, MAX_CHOICES = 64 * 2**10, 32, 4096
KINDS = ("json_object", "json_schema", "regex", "choice", "lark")


@dataclass(frozen=True)
class Grammar:
    """Use a constructor: `json_object`, `json_schema`, `regex`, `choice` or `lark`."""

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise _refused(f"A grammar is one of {', '.join(KINDS)}, not {shown(self.kind)}.")
        if not isinstance(self.text, str) or bool(self.text) == (self.kind == "json_object"):
            raise _refused(f"A grammar of kind {self.kind} needs {'no' if self.kind == 'json_object' else 'a'} text.")
        if len(self.text) > MAX_BYTES or len(_bytes(self.text)) > MAX_BYTES:
            raise _refused(f"A grammar may have at most {MAX_BYTES // 2**10} KiB.")
        if self.kind == "json_schema":
            _check_schema(_parsed(self.text))
        elif self.kind == "choice":
            _check_choices(_parsed(self.text))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that fits a JSON schema, given as a mapping or as its JSON."""
        if isinstance(schema, str):
            return cls("json_schema", schema)
        _check_schema(schema)
        return cls("json_schema", _dumped(schema))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that a regular expression matches from end to end; no look-around, no back-references."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of these texts."""
        _check_choices(choices)
        return cls("choice", _dumped(list(choices)))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in llguidance's dialect of Lark."""
        return cls("lark", text)


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="grammar")


def _bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _refused("A grammar is Unicode text; this one has half a surrogate pair.") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _refused("The grammar's text is not JSON, or is nested too deeply.") from None


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise _refused("The grammar cannot be written as JSON.") from None


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list | tuple) or not 1 <= len(choices) <= MAX_CHOICES:
        raise _refused(f"choice is a list of 1 to {MAX_CHOICES} texts.")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise _refused("Every choice is a text that is not empty.")


def _check_schema(schema: Any) -> None:
    """Depth and size, level by level: neither a deep schema nor a shared or circular one makes this long."""
    if not isinstance(schema, Mapping):
        raise _refused("A JSON schema is a JSON object.")
    level: list[Any] = [schema]
    count = 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_BYTES:  # every value is at least a byte of JSON
            raise _refused(f"A grammar may have at most {MAX_BYTES // 2**10} KiB.")
        level = [part for value in level for part in _parts(value) if isinstance(part, Mapping | list | tuple)]
        if not level:
            return
    raise _refused(f"A JSON schema may be nested at most {MAX_DEPTH} deep.")


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, Mapping) else value
