"""Tails: the ends of sessions, which go before any session goes as a whole.

What it is: T-LRU's first pass (arXiv 2510.15152). The next turn of a session computes its own tokens anyway; as long as
no more than `session_tail` tokens of its history must be computed beside them, its first token is late by little. So
where room is wanted, the oldest sessions lose their last blocks first, and only when every session was trimmed does one
lose more. What it knows nothing about: how much room is wanted. Invariants: what another object owns, too, stays (the
opening that all share does); nothing that is held is offered; blocks are offered from the end on.
"""

from __future__ import annotations

from collections.abc import Iterator

from nanovllm.state.catalog import Entry
from nanovllm.state.objects import StateObject
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane

SESSION = "session"


def tails(plane: Plane, place: Place, namespace: str | None) -> Iterator[Entry]:
    """What may be trimmed in this tier, of the session that was used longest ago first; of one tenant, where named."""
    length = plane.settings.session_tail // plane.settings.block_size
    sessions = [o for o in plane.catalog.objects.values() if o.kind == SESSION and namespace in (None, o.namespace)]
    for obj in sorted(sessions, key=lambda obj: _last_use(plane, obj)) if length else ():
        for key in reversed(obj.chain[-length:]):
            entry = plane.catalog.entries.get(key)
            is_its_own = plane.catalog.owners(key) == {obj.state_id}
            if entry is not None and place.name in entry.tiers and is_its_own and not place.victims.is_held(key):
                yield entry


def _last_use(plane: Plane, obj: StateObject) -> int:
    """When its first block was used; one without blocks has nothing to lose."""
    entry = plane.catalog.entries.get(obj.chain[0]) if obj.chain else None
    return 0 if entry is None else entry.last_use
