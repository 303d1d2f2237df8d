"""Document KV: what a document that goes leaves behind where it was asked about, and who may keep that.

What it is: the digests of a document's path in every namespace that has KV. What it knows nothing about: removing
bytes, prompts. Invariants: what another document, a conversation or a response owns stays; a hint, which nobody put,
keeps none of it; the object is struck out already, and bytes that cannot be read any more are no reason to fail.
"""

from __future__ import annotations

from nanovllm.core.digest import Digest
from nanovllm.state.hinted import take_from_hints
from nanovllm.state.objects import PUBLIC, StateObject
from nanovllm.state.payload import decode
from nanovllm.state.plane import Plane
from nanovllm.state.steps import Steps


def left_of(plane: Plane, obj: StateObject) -> Steps[list[Digest]]:
    """The blocks of this document's path, as each tenant computed it, that no object wants but hints.

    Paths behind a cache salt, under another model, or of a text that does not verify are not found.
    """
    chains = [obj.chain]
    if obj.num_tokens and (obj.namespace == PUBLIC or obj.root != plane.root_of(obj.chain_namespace)):
        entry = plane.catalog.entries.get(obj.payload_key)
        data, _ = (None, "") if entry is None else (yield from plane.payload(entry))
        tokens = () if data is None else decode(data).token_ids
        chains += [plane.chain_of(tokens, namespace) for namespace in sorted(_namespaces(plane, obj))]
    keys = {key: None for chain in chains for key in chain}
    objects = plane.catalog.objects
    left = [key for key in keys if all(objects[owner].is_hint for owner in plane.catalog.owners(key))]
    take_from_hints(plane, left)
    return left


def _namespaces(plane: Plane, obj: StateObject) -> set[str]:
    """Where such a path may have been computed: everywhere, where everybody may ask about it."""
    if obj.namespace != PUBLIC:
        return {obj.chain_namespace}
    found = {entry.namespace for entry in plane.catalog.entries.values() if entry.home is None}
    return found | {obj.chain_namespace} | (set() if plane.device is None else plane.device.namespaces())
