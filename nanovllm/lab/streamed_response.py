"""One streamed turn of /v1/responses, read from its bytes.

What it is: as streamed_answer.py, for the other surface; it has the same facts to tell. What it knows nothing
about: sockets, terminals. Invariants: every shape that a server may send either means something or raises
RemoteError; the turn is complete when its last event has come, for then the server has kept it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanovllm.lab.sse import EventParser
from nanovllm.lab.streamed_answer import Usage, count_of, error_of, object_of

ENDINGS = {"response.completed": "stop", "response.incomplete": "length"}


@dataclass
class StreamedResponse:
    """Feed it chunks in order."""

    text_ns: list[int] = field(default_factory=list)  # when each event that carries text came
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    hit_tokens_by_tier: dict[str, int] = field(default_factory=dict)
    is_done: bool = False
    _parser: EventParser = field(default_factory=EventParser)

    @property
    def is_complete(self) -> bool:
        """Its last event came."""
        return self.is_done

    def feed(self, chunk: bytes, at_ns: int) -> str:
        """The text that this chunk brought. Raises RemoteError."""
        return "".join([self._event(object_of(data), at_ns) for data in self._parser.feed(chunk)])

    def _event(self, event: dict[str, Any], at_ns: int) -> str:
        kind = event.get("type")
        if event.get("error") or kind == "error":
            raise error_of(event)
        if kind in ENDINGS:
            self.is_done, self.finish_reason = True, ENDINGS[kind]
            self._count(event.get("response"))
        delta = event.get("delta") if kind == "response.output_text.delta" else None
        if not isinstance(delta, str) or not delta:
            return ""
        self.text_ns.append(at_ns)
        return delta

    def _count(self, response: Any) -> None:
        usage = response.get("usage") if isinstance(response, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        details, own = usage.get("input_tokens_details"), usage.get("nanovllm")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        self.usage = Usage(count_of(usage.get("input_tokens")), count_of(usage.get("output_tokens")), count_of(cached))
        tiers = own.get("hit_tokens_by_tier") if isinstance(own, dict) else None
        if isinstance(tiers, dict):
            counted = {str(tier): count_of(tokens) for tier, tokens in tiers.items()}
            self.hit_tokens_by_tier = {tier: tokens for tier, tokens in counted.items() if tokens}
