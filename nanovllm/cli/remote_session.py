"""A conversation that a server keeps under a name: `nanovllm chat --url URL --session NAME`.

What it is: answers of /v1/responses in one conversation. What it knows nothing about: terminals, engines.
Invariants: only what is new is sent; a name finds its conversation again, whoever made it; an answer that was
stopped is kept as far as it was seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import quote

from nanovllm.cli.kept_chat import found_of
from nanovllm.cli.remote import Heard, described
from nanovllm.errors import RemoteError
from nanovllm.lab.address import Address
from nanovllm.lab.client import RESPONSES, exchange, stream_turn
from nanovllm.lab.streamed_response import StreamedResponse

CONVERSATIONS = "/v1/conversations"
MOST_BYTES = 16 * 2**20
PAGE = 100
FREE_TRIES, FREE_S = 20, 0.1  # until the server has noticed that a stopped answer's client is gone
_CALLED = {"max_tokens": "max_output_tokens"}
_NOT_SENT = ("stream_options", "messages")


class RemoteSession:
    """Answers of one model on one server, in one conversation there."""

    def __init__(self, address: Address, request: dict[str, Any], name: str, system: str | None) -> None:
        """`request`: the fields of a chat."""
        fields = {_CALLED.get(key, key): value for key, value in request.items() if key not in _NOT_SENT}
        self._address, self._name = address, name
        self._request = fields if system is None else {**fields, "instructions": system}
        self._last: Heard | None = None
        self._response = StreamedResponse()
        self._id = self._find() or self._begin()

    def history(self) -> list[dict[str, Any]]:
        """The server has it."""
        return []

    def opening(self) -> str:
        """How much of it there is."""
        page = self._ask("GET", f"{CONVERSATIONS}/{self._id}/items?limit={PAGE}")
        count = f"{len(page['data'])}{' or more' if page['has_more'] else ''}"
        found = "is new" if count == "0" else f"goes on: {count} messages"
        return f"Session {self._name} {found}; it is kept at {self._address.url}."

    def stream(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """The answer to the last message, piece by piece. Raises RemoteError."""
        self._response = StreamedResponse()
        heard = Heard(time.monotonic_ns(), self._response)
        body = {**self._request, "conversation": self._id, "input": messages[-1]["content"]}
        with closing(stream_turn(self._address, RESPONSES, body, self._response)) as pieces:
            for piece in pieces:
                self._last = heard
                yield piece

    def keep(self, said: Sequence[dict[str, Any]]) -> str | None:
        """The server has kept a turn that came to its end; of one that was stopped it is told what was seen."""
        heard = self._response
        if not heard.is_complete:
            self._add([{"role": one["role"], "content": one["content"]} for one in said])
            return None
        return found_of(heard.usage.prompt_tokens or 0, heard.hit_tokens_by_tier)

    def timeline(self) -> str | None:
        """The last answer in two lines; None before the first."""
        return None if self._last is None else described(self._last)

    def forget(self) -> None:
        """The session begins anew: the server drops what it kept."""
        self._ask("DELETE", f"{CONVERSATIONS}/{self._id}")
        self._id, self._last = self._begin(), None

    def _find(self) -> str | None:
        found = self._ask("GET", f"{CONVERSATIONS}?name={quote(self._name, safe='')}")["data"]
        return str(found[0]["id"]) if found else None

    def _begin(self) -> str:
        return str(self._ask("POST", CONVERSATIONS, {"name": self._name})["id"])

    def _add(self, items: list[dict[str, Any]]) -> None:
        for attempt in range(FREE_TRIES):
            try:
                self._ask("POST", f"{CONVERSATIONS}/{self._id}/items", {"items": items})
                return
            except RemoteError as error:
                if error.status != 409 or attempt == FREE_TRIES - 1:
                    raise
                time.sleep(FREE_S)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = json.loads(exchange(self._address, method, path, body, most_bytes=MOST_BYTES))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or not {"id", "data", "deleted"} & {*answer}:
            raise RemoteError("The server sent no object; it may keep no conversations.", code="not_json")
        return answer
