"""A response while it grows: its items, its token ids, and the events that tell of them.

What it is: the engine's deltas in, OpenAI's events out, in their official order; and the response object at any
moment. What it knows nothing about: sockets, storage, what the request meant. Invariants: every item that is added
is done before the next one is added; the texts of the events join to the items' texts; a response has one item at
least.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.messages import Delta, Finished
from nanovllm.serve.chat_answer import hit_tokens_by_tier
from nanovllm.serve.items import Stored, new_id
from nanovllm.serve.tool_calls import Call, Piece, parser_for
from nanovllm.serve.tools import ToolUse

Event = dict[str, Any]
_STATUSES = {"stop": "completed", "length": "incomplete"}


@dataclass(frozen=True)
class ResponseHead:
    """What a response says before it begins. `echo`: the request's fields as the object shows them."""

    echo: Mapping[str, Any]
    use: ToolUse
    block_size: int
    response_id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(24)}")
    created: int = field(default_factory=lambda: int(time.time()))


class Draft:
    """One response on its way."""

    def __init__(self, head: ResponseHead) -> None:
        self.head = head
        self.output: list[Stored] = []
        self.token_ids: list[int] = []
        self.status = "in_progress"
        self.error: dict[str, Any] | None = None
        self.usage: dict[str, Any] | None = None
        self.diagnostics: dict[str, Any] | None = None
        self._parser = parser_for(head.use) if head.use.is_offered else None
        self._text: list[str] | None = None  # of the message that is open
        self._ended = 0

    def begin(self) -> list[Event]:
        """The first two events."""
        return [{"type": f"response.{name}", "response": self.as_object()} for name in ("created", "in_progress")]

    def add(self, delta: Delta) -> list[Event]:
        """What became certain with `delta`; at its end, everything."""
        self.token_ids += delta.token_ids
        events = [event for piece in self._pieces(delta) for event in self._take(piece)]
        if delta.finish_reason is not None:
            self.status, self._ended = _STATUSES.get(delta.finish_reason, "failed"), int(time.time())
            if not self.output:
                events += self._open()
            events += self._close(self.status)
        return events

    def finish(self, finished: Sequence[Finished]) -> None:
        """All tokens are there: the usage."""
        prompt, new = (sum(getattr(one, f"{kind}_tokens") for one in finished) for kind in ("prompt", "completion"))
        cached = sum(one.cached_tokens for one in finished)
        written = prompt // self.head.block_size * self.head.block_size - cached
        self.usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": max(0, written)},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + new,
            "nanovllm": {"hit_tokens_by_tier": hit_tokens_by_tier(finished)},
        }

    def end(self) -> Event:
        """The last event."""
        return {"type": f"response.{self.status}", "response": self.as_object()}

    def fail(self, error: Mapping[str, Any]) -> Event:
        """The last event of a response that did not come to its end."""
        self.status = "failed"
        self.error = {"code": "server_error", "message": error["message"]}
        return self.end()

    def as_object(self) -> dict[str, Any]:
        """The response as it is now."""
        is_cut = self.status == "incomplete"
        return {
            "id": self.head.response_id,
            "object": "response",
            "created_at": self.head.created,
            "completed_at": self._ended if self.status == "completed" else None,
            "status": self.status,
            "background": False,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            **self.head.echo,
            "output": [*self.output] if self.status != "in_progress" else [],
            "usage": self.usage,
            "prompt_cache_diagnostics": self.diagnostics,
        }

    def _pieces(self, delta: Delta) -> list[Piece]:
        if self._parser is None:
            return [delta.text] if delta.text else []
        return self._parser.feed(delta.text) + (self._parser.finish() if delta.finish_reason is not None else [])

    def _take(self, piece: Piece) -> list[Event]:
        if isinstance(piece, Call):
            return [*self._close("completed"), *self._call(piece)]
        events = self._open() if self._text is None else []
        assert self._text is not None
        self._text.append(piece)
        return [*events, {"type": "response.output_text.delta", **self._place(), "delta": piece, "logprobs": []}]

    def _open(self) -> list[Event]:
        """A message begins."""
        self._text = []
        item = {"id": new_id("message"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        self.output.append(item)
        added = {"type": "response.output_item.added", "output_index": self._index, "item": {**item}}
        return [added, {"type": "response.content_part.added", **self._place(), "part": _part("")}]

    def _close(self, status: str) -> list[Event]:
        """The message that is open, if any, is done."""
        if self._text is None:
            return []
        text, self._text = "".join(self._text), None
        item, place = self.output[-1], self._place()
        item.update(status="completed" if status == "completed" else "incomplete", content=[_part(text)])
        return [
            {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **place, "part": _part(text)},
            {"type": "response.output_item.done", "output_index": self._index, "item": item},
        ]

    def _call(self, call: Call) -> list[Event]:
        item = {"id": new_id("function_call"), "type": "function_call", "call_id": f"call_{secrets.token_hex(12)}"}
        item |= {"name": call.name, "arguments": call.arguments, "status": "completed"}
        self.output.append(item)
        place = {"item_id": item["id"], "output_index": self._index}
        begun = {**item, "arguments": "", "status": "in_progress"}
        told = "response.function_call_arguments"
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": begun},
            {"type": f"{told}.delta", **place, "delta": call.arguments},
            {"type": f"{told}.done", **place, "name": call.name, "arguments": call.arguments},
            {"type": "response.output_item.done", "output_index": self._index, "item": item},
        ]

    @property
    def _index(self) -> int:
        return len(self.output) - 1

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": self._index, "content_index": 0}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
