"""Rendering a model's chat template, an untrusted Jinja program, to text.

What it is: the sandbox, the helpers templates expect, and the limits. What it knows
nothing about: tokens. Invariant: no jinja2 exception escapes, and no output or
intermediate string grows past the cap. Not bounded is the time of a hostile
template's nested loops. The environment matches transformers' `chat_template_utils`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.errors import InvalidRequestError

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_OUTPUT_CHARS = 4 * 1024 * 1024


class ChatTemplate:
    """A compiled template; `render` is pure and safe to call from several threads.

    Raises InvalidRequestError if `source` is too long or not Jinja.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise _refused(f"it has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise _refused(str(error)) from error

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The conversation as one string; `variables` reach the template by name.

        Raises InvalidRequestError with the template's own message if it refuses the
        conversation, or if it fails or its output exceeds the cap.
        """
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(**{**variables, "messages": messages}):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_OUTPUT_CHARS:
                    raise _refused(f"its output exceeds {MAX_OUTPUT_CHARS} characters")
        except InvalidRequestError:
            raise
        except Exception as error:  # a template may raise anything Python operators can
            raise _refused(str(error) or type(error).__name__) from error
        return "".join(pieces)


def _refused(problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The chat template cannot render these messages: {problem}.".replace("..", "."),
        param="messages",
        hint="Check the roles, their order and the content, or pass another template.",
    )


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, with the operators that could build a giant value bounded."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate `left operator right` unless the result could exceed the output cap."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise jinja2.TemplateError(f"the operator {operator} is not available in chat templates")
        if operator == "*" and _repeated_length(left, right) > MAX_OUTPUT_CHARS:
            raise jinja2.TemplateError("a repeated value is too long")
        return super().call_binop(context, operator, left, right)


def _repeated_length(left: Any, right: Any) -> int:
    """Length of `left * right` if that repeats a sequence, else 0."""
    if isinstance(left, int):
        left, right = right, left
    return len(left) * right if isinstance(left, str | list | tuple) and isinstance(right, int) else 0


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The enclosed statements themselves."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter; models were trained without them."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
