"""Hinted: the blocks of an object that goes which hints alone would keep.

What it is: the digests that leave the hints with it. What it knows nothing about: removing bytes, requests. Invariants:
a hint, which nobody put and its tenant cannot see, keeps no KV of a conversation or response that goes, nor what it
computed behind that, which says how it went on, unless another object of the tenant owns it; what anybody else owns,
be it by a hint, whose own requests said the same, stays; the object is struck out, or has its next generation, already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from nanovllm.core.digest import Digest
from nanovllm.state.objects import StateObject
from nanovllm.state.plane import Plane
from nanovllm.state.tails import SESSION


def left_to_hints(plane: Plane, obj: StateObject) -> list[Digest]:
    """The blocks that hints of its tenant kept of this session, and behind it, and that nobody owns from now on."""
    if obj.kind != SESSION or obj.is_hint:
        return []

    def is_left(key: Digest) -> bool:
        owners = [plane.catalog.objects[each] for each in plane.catalog.owners(key)]
        return bool(owners) and all(each.is_hint or each.namespace != obj.namespace for each in owners)

    left = dict.fromkeys(filter(is_left, obj.chain))
    for hint in _hints_on(plane, left, obj.namespace):
        left |= dict.fromkeys(filter(is_left, _behind(plane, hint, left)))
    take_from_hints(plane, left, obj.namespace)
    return [key for key in left if not plane.catalog.owners(key)]


def take_from_hints(plane: Plane, keys: Collection[Digest], namespace: str | None = None) -> None:
    """No hint, or no hint of this tenant, owns these blocks from now on."""
    gone, size = set(keys), plane.settings.block_size
    for hint in _hints_on(plane, keys, namespace):
        rest = tuple(key for key in hint.chain if key not in gone)
        plane.catalog.change(msgspec.structs.replace(hint, chain=rest, num_tokens=len(rest) * size))


def _hints_on(plane: Plane, keys: Collection[Digest], namespace: str | None) -> list[StateObject]:
    """The hints that own any of these; of one tenant, where named."""
    owners = [plane.catalog.objects[each] for each in sorted({o for key in keys for o in plane.catalog.owners(key)})]
    return [each for each in owners if each.is_hint and namespace in (None, each.namespace)]


def _behind(plane: Plane, hint: StateObject, gone: Collection[Digest]) -> Iterator[Digest]:
    """What of a hint's blocks was computed behind these; parents stand before their children in its record."""
    lost, before = set(gone), b""
    for key in hint.chain:
        parent = _parent(plane, key)
        if (before if parent is None else parent) in lost:
            lost.add(key)
            yield key
        before = key


def _parent(plane: Plane, key: Digest) -> Digest | None:
    """The block before it, b"" before a first one; None where the bytes are not known here."""
    entry = plane.catalog.entries.get(key)
    if entry is not None:
        return entry.label.parent
    return None if plane.device is None else plane.device.parent_of(key)
