"""Restore: the catalog at the start, from what the tiers found.

What it is: objects from the records in their labels, entries from all labels. What it knows nothing
about: files. Invariants: of several generations of one object the newest counts and the others are
removed; a tier that cannot be read is left empty with a warning, and the start goes on; nothing is read
but labels, so that a start is quick whatever the size of the state.
"""

from __future__ import annotations

import msgspec

from nanovllm.errors import TierError
from nanovllm.state.catalog import Entry
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.objects import StateObject
from nanovllm.state.place import Place
from nanovllm.state.plane import FULL, Plane, bare
from nanovllm.state.tiers.tier import Found


def restore(plane: Plane) -> list[str]:
    """Fill the catalog; warnings for the operator."""
    warnings: list[str] = []
    found = {name: _scan(place, warnings) for name, place in plane.places.items()}
    replaced = _restore_objects(plane, found, warnings)
    for name, entries in found.items():
        for each in entries:
            if not each.label.record:
                _enter(plane, plane.places[name], each, plane.catalog.kind_of(each.label.key))
    plane.forget([key for key in replaced if not plane.catalog.owners(key)], scrub=True)
    foreign = [o for o in plane.catalog.objects.values() if o.chain and not plane.is_known(o)]
    if foreign:
        warnings.append(
            f"{len(foreign)} objects were computed with another model, block size or setting: "
            "their text is kept, their KV is computed again."
        )
    return warnings


def _scan(place: Place, warnings: list[str]) -> list[Found]:
    try:
        return list(place.tier.scan())
    except TierError as error:
        warnings.append(f"The {place.name} tier starts empty: {error.message}")
        place.reads.trip(FULL if error.code == "tier_full" else error.message)
        return []


def _restore_objects(plane: Plane, found: dict[str, list[Found]], warnings: list[str]) -> dict[bytes, None]:
    """Enter the newest of each; the keys of what it replaced, which whoever was killed had not removed yet."""
    replaced: dict[bytes, None] = {}
    newest: dict[str, tuple[StateObject, str, Found]] = {}
    stale: list[tuple[str, bytes]] = []
    for name, entries in found.items():
        for each in entries:
            if not each.label.record:
                continue
            obj = _object_of(each)
            if obj is None:
                warnings.append(f"A record in {name} is not one of this version; it is left alone.")
                continue
            old = newest.get(obj.state_id)
            if old is not None and old[0].payload_key >= obj.payload_key:
                stale.append((name, each.label.key))
                replaced |= _own_keys(obj)
                continue
            if old is not None:
                stale.append((old[1], old[2].label.key))
                replaced |= _own_keys(old[0])
            newest[obj.state_id] = (obj, name, each)
    for obj, name, each in sorted(newest.values(), key=lambda row: (row[0].created_ms, row[0].state_id)):
        displaced = plane.catalog.add(obj)
        _enter(plane, plane.places[name], each, obj.kind, home=name)
        if displaced is not None:
            replaced |= dict.fromkeys(plane.catalog.remove(displaced))
    for name, key in stale:
        plane.debts.owe(name, [key])
    return replaced


def _own_keys(obj: StateObject) -> dict[bytes, None]:
    """What an older generation alone may have owned; a hint's blocks were anybody's before, and are again."""
    return {} if obj.is_hint else dict.fromkeys(obj.chain)


def _object_of(found: Found) -> StateObject | None:
    try:
        obj = msgspec.msgpack.decode(found.label.record, type=StateObject)
    except msgspec.DecodeError:
        return None
    sound = obj.payload_key == found.label.key and obj.kind in KIND_TABLE and obj.namespace == found.label.namespace
    return obj if sound else None


def _enter(plane: Plane, place: Place, found: Found, kind: str, home: str | None = None) -> None:
    tokens = max(len(found.label.tokens) // 4, 1)
    entry = Entry(bare(found.label), kind, found.size_bytes, tokens, home=home)
    place.enter(plane.catalog.entries.setdefault(found.label.key, entry))
