"""Kind `knowledge`: a document or chunk, with the KV of its exact path.

What it is: text that many prompts carry. What it knows nothing about: retrieval. Naming: `name@version`,
the bare name is the newest version. Value: PGDSF's, which knows how often, how long and behind what.
Consistency: a new version takes the name; who reads the old one keeps reading it. Isolation: a tenant's,
or everybody's in the namespace `public`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from nanovllm.state.kinds.kind import Kind
from nanovllm.state.objects import PUBLIC, Document, StateObject, Storable


class Knowledge(Kind):
    """Text durable, KV derived."""

    name: ClassVar = "knowledge"
    generation: ClassVar = "upload; its KV by prefill of its exact path (system text, documents before it, itself)"
    residency: ClassVar = "hours to for ever; few documents get most questions"
    reuse: ClassVar = "the same documents in the same order behind the same system text"
    correctness: ClassVar = "text as put; KV as kind kv; a new version is seen by new lookups only"
    transfer: ClassVar = "as kv, in longer runs; can be fetched while retrieval still runs"
    lost: ClassVar = "KV: prefill of the document; text: never, once acknowledged"
    durable: ClassVar = True
    share: ClassVar[float] = 2.0
    policies: ClassVar[Mapping[str, str]] = MappingProxyType({"host": "pgdsf", "disk": "pgdsf"})

    def accepts(self, obj: Storable) -> bool:
        """A text or a Document."""
        return isinstance(obj, str | Document)

    def visible_to(self, obj: StateObject, namespace: str) -> bool:
        """The tenant's own, and public ones."""
        return obj.namespace in (namespace, PUBLIC)
