"""From the messages of a request to those a chat template renders, and to token ids.

What it is: the bridge between OpenAI's message shapes and what templates expect. What it
knows nothing about: HTTP, the engine. Invariants: arguments reach a template as objects;
a model whose template knows no tools reads and writes calls in one generic way; no
variable reaches the template but those listed, and none that it does not use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from nanovllm.errors import InvalidRequestError, UnsupportedParameterError, shown
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.serve.protocol import AssistantMessage, Content, FunctionTool, Message, ToolMessage
from nanovllm.serve.tools import CLOSING, OPENING, ToolStyle

# What a client may say to a template. Never `tokenize`, `messages` and the like: they are arguments of our own calls.
TEMPLATE_VARIABLES = (
    "enable_thinking",
    "thinking",
    "reasoning_effort",
    "documents",
    "date_string",
    "tools_in_user_message",
)
MISTRAL_ID_LENGTH = 9  # its template insists on it
COUNTED_BYTES = 65536  # a longer conversation is not tokenized twice only to count what the template added
_GENERIC = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]
    add_generation_prompt: bool = True


def conversation(
    messages: list[Message],
    functions: tuple[FunctionTool, ...],
    style: ToolStyle,
    template: str,
    variables: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> Conversation:
    """The request's conversation as `template` wants it. Raises InvalidRequestError."""
    knows_developer = re.search(r"\bdeveloper\b", template) is not None
    turns = [_turn(index, message, style, knows_developer) for index, message in enumerate(messages)]
    tools = [{"type": "function", "function": _plain(function)} for function in functions]
    if not style.is_native:
        turns = _merged_results(turns)
        return Conversation(_with_tools(turns, tools), None, variables, add_generation_prompt)
    return Conversation(turns, tools or None, variables, add_generation_prompt)


def template_variables(given: Mapping[str, Any] | None, effort: str | None, template: str) -> dict[str, Any]:
    """The variables a request sets. Raises UnsupportedParameterError for any this template would ignore."""
    variables = dict(given or {})
    for name, value in variables.items():
        param = f"chat_template_kwargs.{name[:60]}"
        if name not in TEMPLATE_VARIABLES or not _uses(template, name):
            raise UnsupportedParameterError(f"{param} is not a variable of this model's chat template.", param=param)
        if not isinstance(value, list if name == "documents" else bool | str):
            raise InvalidRequestError(f"{param} cannot be {shown(value)}.", param=param)
    if effort is not None:
        if not _uses(template, "reasoning_effort"):
            raise UnsupportedParameterError("This model has no reasoning_effort.", param="reasoning_effort")
        variables["reasoning_effort"] = effort
    return variables


def encode_conversation(tokenizer: ChatTokenizer, chat: Conversation) -> tuple[list[int], int | None]:
    """Token ids, and how many of them the template added (None for a long conversation)."""
    ids = tokenizer.encode_chat(chat.messages, chat.add_generation_prompt, chat.tools, **chat.variables)
    if sum(len(turn["content"]) for turn in chat.messages) > COUNTED_BYTES:
        return ids, None
    return ids, max(0, len(ids) - tokenizer.count_content_tokens(chat.messages))


def text_of(content: Content | None) -> str:
    """The text of a message; parts stand on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _uses(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _turn(index: int, message: Message, style: ToolStyle, knows_developer: bool) -> dict[str, Any]:
    """One message as a template reads it."""
    role = str(message.__struct_config__.tag)
    role = "system" if role == "developer" and not knows_developer else role
    turn: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if message.name is not None:
        turn["name"] = message.name
    if isinstance(message, ToolMessage):
        return turn | {"tool_call_id": _call_id(message.tool_call_id, style)}
    if isinstance(message, AssistantMessage):
        _add_assistant(turn, index, message, style)
    return turn


def _add_assistant(turn: dict[str, Any], index: int, message: AssistantMessage, style: ToolStyle) -> None:
    if message.content is None and message.refusal is not None:
        turn["content"] = message.refusal
    elif message.content is None and not message.tool_calls:
        raise InvalidRequestError("An assistant message has content or tool_calls.", param=f"messages[{index}].content")
    if message.reasoning_content is not None:
        turn["reasoning_content"] = message.reasoning_content
    calls = [
        _call(f"messages[{index}].tool_calls[{i}]", call, style) for i, call in enumerate(message.tool_calls or [])
    ]
    if calls and style.is_native:
        turn["tool_calls"] = calls
    elif calls:
        written = [f"{OPENING}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSING}" for call in calls]
        turn["content"] = "\n".join(filter(None, [turn["content"], *written]))


def _call(param: str, call: Any, style: ToolStyle) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        param = f"{param}.function.arguments"
        raise InvalidRequestError(f"{param} is not a JSON object.", param=param) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": _call_id(call.id, style), "type": "function", "function": function}


def _call_id(given: str, style: ToolStyle) -> str:
    if style.family != "mistral":
        return given
    letters = "".join(letter for letter in given if letter.isalnum() and letter.isascii())
    return letters[-MISTRAL_ID_LENGTH:].rjust(MISTRAL_ID_LENGTH, "0")


def _merged_results(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool results as the user's turns, those that follow each other in one."""
    merged: list[dict[str, Any]] = []
    was_result = False
    for turn in turns:
        is_result = turn["role"] == "tool"
        if is_result:
            turn = {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
        if is_result and was_result:
            merged[-1]["content"] += "\n" + turn["content"]
        else:
            merged.append(turn)
        was_result = is_result
    return merged


def _with_tools(turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions described at the end of the system message, which is made if there is none."""
    if not tools:
        return turns
    text = _GENERIC.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if turns and turns[0]["role"] == "system":
        system = {**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}
        return [system, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _plain(function: FunctionTool) -> dict[str, Any]:
    described = {"name": function.name, "description": function.description or ""}
    return described | {"parameters": function.parameters or {"type": "object", "properties": {}}}
