"""Kind `session`: a conversation, its messages and the tokens computed for them.

What it is: history that grows turn by turn. What it knows nothing about: chat templates. Naming: its id;
KV is found by tokens, never by session. Value: recency, until its time to live is over. Consistency: the
text is the truth and carries a generation, so that of two turns at once one is refused. Isolation: strictly
its tenant's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from nanovllm.state.kinds.kind import Kind
from nanovllm.state.objects import Session as SessionObject
from nanovllm.state.objects import StateObject, Storable


class Session(Kind):
    """Text durable, KV written behind."""

    name: ClassVar = "session"
    generation: ClassVar = "turn by turn; KV by prefill and decode of its turns"
    residency: ClassVar = "until its TTL; gaps of minutes between turns, of seconds between tool calls"
    reuse: ClassVar = "the new prompt begins with the stored tokens; the longest common prefix counts"
    correctness: ClassVar = "text exact and durable; KV disposable; one writer per generation"
    transfer: ClassVar = "as kv; can be fetched when the request arrives"
    lost: ClassVar = "KV: one long prefill; text: never, once acknowledged"
    durable: ClassVar = True
    ttl_s: ClassVar[float | None] = 30 * 86_400
    share: ClassVar[float] = 2.0
    policies: ClassVar[Mapping[str, str]] = MappingProxyType({"host": "lru", "disk": "lru"})

    def accepts(self, obj: Storable) -> bool:
        """Messages, or a Session."""
        is_messages = isinstance(obj, list | tuple) and all(isinstance(message, Mapping) for message in obj)
        return is_messages or isinstance(obj, SessionObject)

    def replaces(self, old: StateObject, new: StateObject) -> bool:
        """Two conversations do not share a name: the second is refused. A hint gives way to the conversation."""
        return old.is_hint
