"""A grammar that makes the model call, for `tool_choice` and for strict functions.

What it is: Lark text of one or several calls in the model's own style, their arguments
bound by each function's schema. What it knows nothing about: how grammars are compiled.
Invariant: whatever this grammar accepts to its end, tool_calls.py reads as calls.

Each schema stands in a rule of its own, so that its `$ref`s find their root.
"""

from __future__ import annotations

import json
from typing import Any

from nanovllm.serve.protocol import FunctionTool, Schema
from nanovllm.serve.tools import CLOSING, OPENING, ToolStyle, ToolUse

MAX_CALLS = 8
# One way of writing JSON: a small model that may choose its white space may choose to write nothing else.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Where one of these says what an object may hold, nothing is added to it.
OPENING_KEYS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})
NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
_TEXTS = {
    "hermes": r"/(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/",
    "llama": r"/\s*[^\s{](?s:.*)/",
    "mistral": r"/\s*[^\s\[](?s:.*)/",
}


def tool_grammar(use: ToolUse, answer: Schema | None) -> str | None:
    """Lark text, or None where the model writes what it likes. `answer`: what else than calls it may write."""
    if not use.is_offered:
        return None
    is_strict = any(function.strict for function in use.functions)
    if use.is_forced:
        start = "start: calls"
    elif answer is not None:
        start = f"start: calls | answer\nanswer: %json {_json(answer)}"
    elif is_strict:
        text = "TEXT? calls | TEXT?" if use.style.family == "hermes" else "calls | TEXT?"
        start = f"start: {text}\nTEXT: {_TEXTS[use.style.family]}"
    else:
        return None
    return "\n".join([start, *_calls(use), *_functions(use, every=use.is_forced)]) + "\n"


def _calls(use: ToolUse) -> list[str]:
    more = f"{{0,{MAX_CALLS - 1}}}" if use.is_parallel else "{0,0}"
    call = f'"{OPENING}\\n" call "\\n{CLOSING}"' if use.style.family == "hermes" else "call"
    separator = {"hermes": '"\\n"', "llama": '"; "', "mistral": '", "'}[use.style.family]
    several = f"one ({separator} one){more}" if use.is_parallel else "one"
    calls = f'"[" {several} "]"' if use.style.family == "mistral" else several
    return [f"calls: {calls}", f"one: {call}"]


def _functions(use: ToolUse, *, every: bool) -> list[str]:
    """One rule a function. Where calls are not forced, a function that is not strict takes any object."""
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(use.functions)))]
    for index, function in enumerate(use.functions):
        schema = _arguments(function) if every or function.strict else {"type": "object"}
        head = _quoted(f'{{"name": "{function.name}", "{_key(use.style)}": ')
        rules += [f'call_{index}: {head} arguments_{index} "}}"', f"arguments_{index}: %json {_json(schema)}"]
    return rules


def _key(style: ToolStyle) -> str:
    return style.arguments_key


def _arguments(function: FunctionTool) -> Schema:
    """The schema of a function's arguments. One that only lists properties means: these, and no others."""
    if function.parameters is None:
        return NO_ARGUMENTS
    schema = {**function.parameters, "type": "object"}
    if schema.keys() & OPENING_KEYS:
        return schema
    return {"additionalProperties": False, **schema}


def _json(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": LAYOUT})


def _quoted(text: str) -> str:
    return json.dumps(text)
