"""What a request constrains its output to: one grammar, or none.

What it is: response_format, structured_outputs and forced tool calls as a `Grammar`. What
it knows nothing about: how it is compiled; that happens beside the engine, whose refusal
is a 400. Invariant: at most one of them speaks about the content; a forced call leaves none.
"""

from __future__ import annotations

from typing import Any

from nanovllm.core.grammar import Grammar
from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.config import Limits
from nanovllm.serve.protocol import JsonSchemaFormat, ResponseFormat, Schema, StructuredOutputs, TextFormat
from nanovllm.serve.tool_grammar import tool_grammar
from nanovllm.serve.tools import ToolUse, check_schema

ANY_OBJECT: Schema = {"type": "object"}


def grammar_of(
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None,
    use: ToolUse | None,
    limits: Limits,
) -> Grammar | None:
    """The grammar of the whole output. Raises InvalidRequestError."""
    try:
        return _grammar(response_format, structured, use, limits)
    except InvalidRequestError as error:
        if error.param == "grammar":
            error.param = blamed(use, response_format)
        raise


def _grammar(
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None,
    use: ToolUse | None,
    limits: Limits,
) -> Grammar | None:
    schema = _schema(response_format, limits)
    kinds = {} if structured is None else _given(structured)
    if kinds and schema is not None:
        raise InvalidRequestError("Give response_format or structured_outputs, not both.", param="structured_outputs")
    if use is not None and use.is_offered:
        if kinds:
            raise UnsupportedParameterError("structured_outputs does not go with tools.", param="structured_outputs")
        text = tool_grammar(use, schema)
        if text is not None:
            return Grammar.lark(text)
    if kinds:
        return _structured(*kinds.popitem(), limits)
    if schema is None:
        return None
    return Grammar.json_object() if schema is ANY_OBJECT else Grammar.json_schema(schema)


def _schema(response_format: ResponseFormat | None, limits: Limits) -> Schema | None:
    if response_format is None or isinstance(response_format, TextFormat):
        return None
    if not isinstance(response_format, JsonSchemaFormat):
        return ANY_OBJECT
    wanted = response_format.json_schema
    if wanted.name.endswith("\n"):
        raise InvalidRequestError("The schema's name ends in a line.", param="response_format.json_schema.name")
    check_schema(wanted.schema, "response_format.json_schema.schema", limits)
    return ANY_OBJECT if wanted.schema is None else wanted.schema


def _given(structured: StructuredOutputs) -> dict[str, Any]:
    fields = {name: getattr(structured, name) for name in structured.__struct_fields__}
    kinds = {name: value for name, value in fields.items() if value is not None and value is not False}
    if len(kinds) != 1:
        raise InvalidRequestError(
            f"structured_outputs takes exactly one of {', '.join(fields)}.", param="structured_outputs"
        )
    return kinds


def _structured(kind: str, value: Any, limits: Limits) -> Grammar:
    param = f"structured_outputs.{kind}"
    if kind == "json_object":
        return Grammar.json_object()
    if kind == "json":
        check_schema(value, param, limits)
        return Grammar.json_schema(value)
    if sum(len(text.encode()) for text in ([value] if isinstance(value, str) else value)) > limits.schema_bytes:
        raise InvalidRequestError(f"{param} has more than {limits.schema_bytes} bytes.", param=param)
    if kind == "regex":
        return Grammar.regex(value)
    return Grammar.choice(value) if kind == "choice" else Grammar.lark(value)


def blamed(use: ToolUse | None, response_format: object) -> str:
    """The field that a grammar which cannot be compiled came from."""
    if use is not None and use.is_forced:
        return "tools"
    return "response_format" if response_format is not None else "structured_outputs"
