"""Memory: what of a plane is worth keeping over a restart, as plain data and back.

What it is: the parts that every plane has: how fast its tiers were, what was popular, pins with the time they have
left, and the last receipts. What it knows nothing about: where they are written (`learned.py`). Invariants: each part
is bounded; what no longer exists is not taken in again; taking in moves no bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from nanovllm.state.kinds.meta import BANDWIDTHS, PINS, POPULARITY, RECEIPTS
from nanovllm.state.learned import META, Part
from nanovllm.state.place import Bandwidth
from nanovllm.state.plane import Plane
from nanovllm.state.receipts import Receipt
from nanovllm.state.residency import Residency

MAX_POPULAR = 1_024  # of one kind in one tier
MAX_RECEIPTS, PER_OBJECT, MAX_CANDIDATES = 2_000, 16, 4


def parts_of(plane: Plane, residency: Residency) -> list[Part]:
    """The parts of a plane; pins and receipts hold whatever the model."""
    return [
        Part(BANDWIDTHS, lambda: _speeds(plane), lambda data: _recall_speeds(plane, data), is_small=True),
        Part(POPULARITY, lambda: _popularity(plane), lambda data: _recall_popularity(plane, data)),
        Part(RECEIPTS, lambda: _receipts(plane), lambda data: _recall_receipts(plane, data), is_bound=False),
        Part(PINS, residency.record, residency.recall, is_bound=False, is_small=True),
    ]


def _speeds(plane: Plane) -> dict[str, dict[str, float]]:
    """Bytes per millisecond of what was measured, now or before."""
    found = {}
    for name, place in plane.places.items():
        both = {"read": place.read_speed, "write": place.write_speed}
        found[name] = {way: speed.bytes_per_ms for way, speed in both.items() if speed.is_known}
    return found


def _recall_speeds(plane: Plane, data: dict[str, dict[str, float]]) -> None:
    for name, place in plane.places.items():
        for way, rate in data.get(name, {}).items():
            if not 0 < float(rate) < float("inf"):
                raise ValueError("this is no speed")
            speed: Bandwidth = {"read": place.read_speed, "write": place.write_speed}[way]
            speed.recall(float(rate))


def _popularity(plane: Plane) -> dict[str, dict[str, list[list[Any]]]]:
    """tier -> kind -> [key, what its policy knows of it], what is worth least first."""
    return {
        name: {
            kind: [[key.hex(), *values] for key, *values in rows if isinstance(key, bytes)]
            for kind, rows in place.victims.memory(MAX_POPULAR).items()
        }
        for name, place in plane.places.items()
    }


def _recall_popularity(plane: Plane, data: dict[str, dict[str, list[list[Any]]]]) -> None:
    for name, place in plane.places.items():
        for kind, rows in data.get(name, {}).items():
            place.victims.recall(kind, [(bytes.fromhex(key), *map(float, values)) for key, *values in rows])


def _receipts(plane: Plane) -> dict[str, Any]:
    """The last receipts of each object that is still there; of bookkeeping none."""
    kept: dict[str, Any] = {}
    room = MAX_RECEIPTS
    for state_id, receipts, count in plane.history.newest_first():
        obj = plane.catalog.objects.get(state_id)
        if obj is None or obj.kind == META:
            continue
        last = receipts[-min(PER_OBJECT, room) :]
        room -= len(last)
        kept[state_id] = {"count": count, "receipts": [_short(receipt) for receipt in last]}
        if room <= 0:
            break
    return kept


def _short(receipt: Receipt) -> Any:
    return msgspec.to_builtins(replace(receipt, candidates=receipt.candidates[:MAX_CANDIDATES]))


def _recall_receipts(plane: Plane, data: dict[str, Any]) -> None:
    for state_id, found in reversed(data.items()):
        if state_id in plane.catalog.objects:
            receipts = msgspec.convert(found["receipts"], list[Receipt])
            plane.history.recall(state_id, receipts, int(found["count"]))
