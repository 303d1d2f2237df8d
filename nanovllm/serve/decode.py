"""From the bytes of a body to a checked Struct, or a 400 that names the field at fault.

What it is: strict decoding, and msgspec's refusals in the words of this server. What it
knows nothing about: what the fields mean. Invariants: no input raises anything but
InvalidRequestError; nesting is bounded, and measured without recursion; no text that
gets through holds a NUL or a lone surrogate.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec

from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.protocol import refused_fields

Body = TypeVar("Body", bound=msgspec.Struct)
_PLACE = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_ELSEWHERE = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
_ELSEWHERE_CALLED = {  # by llama.cpp, Ollama, TGI and by vLLM's offline API
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "format": "response_format",
    "json_schema": "response_format",
    "grammar": "structured_outputs",
    "guided_decoding": "structured_outputs",
    "enable_thinking": "chat_template_kwargs",
    "thinking": "chat_template_kwargs",
    "think": "chat_template_kwargs",
    "input": "prompt",
    "inputs": "prompt",
    "content": "prompt",
    "text": "prompt",
}
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")


def decode(data: bytes, kind: type[Body], max_depth: int) -> Body:
    """The body as `kind`. Raises InvalidRequestError."""
    if not data.strip():
        raise InvalidRequestError("The body is empty.", hint="Send a JSON object.")
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The body is not JSON: {str(error).rstrip('.')}.") from None
    except RecursionError:
        raise too_deep(None, max_depth) from None
    _check_values(body, max_depth)
    return body


def too_deep(param: str | None, max_depth: int) -> InvalidRequestError:
    """The refusal of a value that is nested too deeply."""
    return InvalidRequestError(f"{param or 'The body'} is nested deeper than {max_depth} levels.", param=param)


def depth_of(value: Any, most: int) -> int:
    """How deep objects and lists nest in `value`; `most` + 1 where that is exceeded. No recursion."""
    level, depth = [value], 0
    while level and depth <= most:
        inner: list[Any] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        nested = any(isinstance(item, dict | list) for item in level)
        level, depth = inner, depth + nested
    return depth


def _refusal(message: str, kind: type[msgspec.Struct]) -> InvalidRequestError:
    """msgspec's complaint, with the field it concerns as `param`."""
    place = _PLACE.search(message)
    path = place["path"].lstrip(".") if place else ""
    problem = message[: place.start()] if place else message
    unknown, missing = _UNKNOWN.match(problem), _MISSING.match(problem)
    if unknown:
        return _unknown(path, unknown["name"], kind)
    if missing:
        absent = _joined(path, missing["name"])
        return InvalidRequestError(f"{absent} is missing.", param=absent)
    reason = refused_fields(kind).get(path)
    if reason is not None:
        return UnsupportedParameterError(f"{path} is not supported: {reason}.", param=path)
    field = path.replace("[...]", "")
    param = field or None
    if re.fullmatch(r"messages\[\d+\]\.content\[\d+\]\.type", field):
        return InvalidRequestError(
            f"{param}: {problem[:1].lower()}{problem[1:]}; content parts are text.",
            param=param,
            hint='Send {"type": "text", ...}.',
        )
    return InvalidRequestError(f"{field or 'The body'}: {problem[:1].lower()}{problem[1:]}.", param=param)


def _unknown(path: str, name: str, kind: type[msgspec.Struct]) -> UnsupportedParameterError:
    shown = name[:60]
    hint = None if path else _hint(shown, kind)
    param = _joined(path, shown)
    return UnsupportedParameterError(
        f"Unknown field {param}.", param=param, hint=hint or "It would be ignored, so it is refused."
    )


def _hint(name: str, kind: type[msgspec.Struct]) -> str | None:
    """What somebody who is used to another server, or cannot type, may have meant; a field that is honoured."""
    if name in _ELSEWHERE:
        return f"POST {_ELSEWHERE[name]} takes it."
    honoured = [field for field in kind.__struct_fields__ if field not in refused_fields(kind)]
    known_as = [_ELSEWHERE_CALLED[name]] if _ELSEWHERE_CALLED.get(name) in honoured else []
    near = known_as or difflib.get_close_matches(name, honoured, n=1, cutoff=0.75)
    return f"Did you mean {near[0]}?" if near else None


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_values(body: msgspec.Struct, max_depth: int) -> None:
    """Walk every value once, level by level: nesting, NUL, surrogates."""
    for name in body.__struct_fields__:
        level: list[Any] = [getattr(body, name)]
        depth = 1  # the body itself
        while level:
            inner: list[Any] = []
            for item in level:
                if isinstance(item, str):
                    _check_text(name, item)
                else:
                    inner.extend(_within(item))
            depth += any(isinstance(item, dict | list | msgspec.Struct) for item in level)
            if depth > max_depth:
                raise too_deep(name, max_depth)
            level = inner


def _within(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, msgspec.Struct):
        return [getattr(item, name) for name in item.__struct_fields__]
    if isinstance(item, list):
        return [] if item and type(item[0]) is int and type(item[-1]) is int else item
    return []


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise InvalidRequestError(f"{name} contains a NUL character.", param=name, hint="Remove it.")
