"""Tools in a request: which may be called, and how this model's template speaks of them.

What it is: the request's tools, checked, and the three ways of writing a call that the
model families here were trained on. What it knows nothing about: how a call is enforced
(tool_grammar.py), read back (tool_calls.py) or rendered (conversation.py). Invariant:
every named function exists, and no two have the same name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import msgspec

from nanovllm.errors import InvalidRequestError
from nanovllm.serve.config import Limits
from nanovllm.serve.decode import depth_of, too_deep
from nanovllm.serve.protocol import ChatRequest, FunctionTool, NamedToolChoice, Schema, Tool

Family = Literal["hermes", "llama", "mistral"]
OPENING, CLOSING = "<tool_call>", "</tool_call>"
PYTHON_TAG, MISTRAL_TAG = "<|python_tag|>", "[TOOL_CALLS]"


@dataclass(frozen=True)
class ToolStyle:
    """How a model writes calls. `is_native`: its own template renders tools, calls and results."""

    family: Family
    is_native: bool

    @property
    def arguments_key(self) -> str:
        """The name under which a call's arguments stand."""
        return "parameters" if self.family == "llama" else "arguments"


@dataclass(frozen=True)
class ToolUse:
    """What a request allows: nothing (`choice` "none"), what the model likes, at least one call, one function."""

    style: ToolStyle
    functions: tuple[FunctionTool, ...]
    choice: str  # none, auto, required, named
    is_parallel: bool = True

    @property
    def is_offered(self) -> bool:
        """True where the model hears of the functions, and its calls are read."""
        return bool(self.functions) and self.choice != "none"

    @property
    def is_forced(self) -> bool:
        """True where the answer must be a call."""
        return self.choice in ("required", "named")


def style_of(template: str | None) -> ToolStyle:
    """The style a chat template was written for; a template that knows no tools gets the generic one."""
    text = template or ""
    if re.search(r"\btools\b", text) and "<function=" not in text:
        if OPENING in text:
            return ToolStyle("hermes", is_native=True)
        if MISTRAL_TAG in text:
            return ToolStyle("mistral", is_native=True)
        if PYTHON_TAG in text or "parameters" in text:
            return ToolStyle("llama", is_native=True)
    return ToolStyle("hermes", is_native=False)


def tool_use(body: ChatRequest, template: str | None, limits: Limits) -> ToolUse:
    """The request's tools. Raises InvalidRequestError."""
    tools = body.tools or []
    check_tools(tools, limits)
    style, names = style_of(template), {tool.function.name: tool.function for tool in tools}
    parallel = body.parallel_tool_calls is not False
    choice = body.tool_choice or ("auto" if tools else "none")
    if choice != "none" and not tools:
        raise InvalidRequestError("tool_choice needs tools.", param="tool_choice")
    if not isinstance(choice, NamedToolChoice):
        return ToolUse(style, tuple(names.values()), choice, parallel)
    if choice.function.name not in names:
        raise InvalidRequestError(
            f"tool_choice names {choice.function.name}, which is not among the tools.",
            param="tool_choice.function.name",
        )
    return ToolUse(style, (names[choice.function.name],), "named", is_parallel=False)


def check_tools(tools: list[Tool], limits: Limits) -> None:
    """Raise InvalidRequestError for too many tools, a name used twice, a schema that is too large."""
    if len(tools) > limits.tools:
        raise InvalidRequestError(f"At most {limits.tools} tools are allowed.", param="tools")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        param = f"tools[{index}].function"
        if tool.function.name in seen or tool.function.name.endswith("\n"):
            raise InvalidRequestError(f"{param}.name is not a name of its own.", param=f"{param}.name")
        seen.add(tool.function.name)
        check_schema(tool.function.parameters, f"{param}.parameters", limits)


def check_schema(schema: Schema | None, param: str, limits: Limits) -> None:
    """Raise InvalidRequestError where a schema exceeds the limits."""
    if schema is None:
        return
    if depth_of(schema, limits.schema_depth) > limits.schema_depth:
        raise too_deep(param, limits.schema_depth)
    if len(msgspec.json.encode(schema)) > limits.schema_bytes:
        raise InvalidRequestError(f"{param} has more than {limits.schema_bytes} bytes.", param=param)
