"""One streamed answer of an OpenAI-compatible server, read from its bytes.

What it is: the place where bytes with arrival times become text, token arrivals,
usage and an end. `chat` feeds it live, the load generator after the run. What it
knows nothing about: sockets, statistics. Invariants: every shape that a server may
send either means something or raises RemoteError, nothing else; times are those of
the chunk in which an event's last byte came.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from nanovllm.errors import RemoteError
from nanovllm.lab.sse import EventParser

TEXT_FIELDS = ("content", "text")  # the answer: in chat's delta, in completions' choice
THOUGHT_FIELDS = ("reasoning_content", "reasoning")  # tokens too, but no part of what is said


@dataclass(frozen=True)
class Usage:
    """What the server counted. None: it did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None

    @classmethod
    def of(cls, found: Any) -> Usage:
        """From the `usage` object; what is no count is left out."""
        usage = found if isinstance(found, dict) else {}
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return cls(count_of(usage.get("prompt_tokens")), count_of(usage.get("completion_tokens")), count_of(cached))


@dataclass
class StreamedAnswer:
    """Feed it chunks in order. `is_complete` says whether the answer came to its end."""

    text_ns: list[int] = field(default_factory=list)  # when each event that carries text came
    last_choice_ns: int | None = None  # when the last event with a choice came: text, or the finish reason
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    is_done: bool = False  # `data: [DONE]` came
    _parser: EventParser = field(default_factory=EventParser)

    @property
    def is_complete(self) -> bool:
        """Some servers leave `[DONE]` out, so a finish reason is an end too."""
        return self.is_done or self.finish_reason is not None

    def feed(self, chunk: bytes, at_ns: int) -> str:
        """The text that this chunk brought. Raises RemoteError for an error event and for what is no answer."""
        return "".join([self._event(data, at_ns) for data in self._parser.feed(chunk)])

    def _event(self, data: str, at_ns: int) -> str:
        if data.strip() == "[DONE]":
            self.is_done = True
        if self.is_done:
            return ""
        event = object_of(data)
        if event.get("error"):
            raise error_of(event)
        if event.get("usage") is not None:
            self.usage = Usage.of(event["usage"])
        choice = _first_choice(event)
        return "" if choice is None else self._choice(choice, at_ns)

    def _choice(self, choice: dict[str, Any], at_ns: int) -> str:
        text = _texts(choice, TEXT_FIELDS)
        if text or _texts(choice, THOUGHT_FIELDS):
            self.text_ns.append(at_ns)
        reason = choice.get("finish_reason")
        self.finish_reason = reason if isinstance(reason, str) else self.finish_reason
        self.last_choice_ns = at_ns
        return text


def error_of(body: Any, status: int = 502, hint: str | None = None) -> RemoteError:
    """The error that a server's JSON tells: OpenAI's `{"error": {...}}`, or a bare message."""
    error = body.get("error", body) if isinstance(body, dict) else body
    fields = error if isinstance(error, dict) else {"message": error}
    message = fields.get("message") or fields.get("detail")
    text = (" ".join(message.split()) if isinstance(message, str) else "") or "no reason given"
    code = fields.get("code") or fields.get("type")
    name = str(code)[:60] if code else "server_error"
    return RemoteError(f"The server answered: {text[:500]}", code=name, status=status, hint=hint)


def object_of(data: str) -> dict[str, Any]:
    """An event's data. Raises RemoteError on what is no JSON object."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise RemoteError(f"The server sent an event that is no JSON object: {data[:80]!r}.", code="not_json")
    return event


def _first_choice(event: dict[str, Any]) -> dict[str, Any] | None:
    choices = event.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def _texts(choice: dict[str, Any], names: tuple[str, ...]) -> str:
    delta = choice.get("delta")
    places = (choice, delta) if isinstance(delta, dict) else (choice,)
    found = [place.get(name) for place in places for name in names]
    return "".join(piece for piece in found if isinstance(piece, str))


def count_of(value: Any) -> int | None:
    """A count that a server may have meant; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None
