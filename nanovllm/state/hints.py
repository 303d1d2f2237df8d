"""Hints: sessions that requests name and nobody put. Each is a small record that owns the blocks of its requests.

What it is: the keeping of those records, so that what a session will want again counts as a session's, is listed and
explained, and goes when the session is dropped. What it knows nothing about: requests, texts. Invariants: a
conversation that was put under the same name is left alone, it owns what its tokens say; records are bounded in
number, in blocks and in time; one record is written at a time, and what comes meanwhile is in the next; nothing waits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import takewhile

import msgspec

from nanovllm.core.digest import Digest
from nanovllm.errors import InvalidRequestError, NanoVLLMError
from nanovllm.state.naming import SECOND_MS, Naming
from nanovllm.state.objects import Session, StateObject, check_name, new_state_id
from nanovllm.state.payload import payload_of
from nanovllm.state.plane import Plane
from nanovllm.state.storing import Pending
from nanovllm.state.tails import SESSION

Owner = tuple[str, str]  # namespace, name


@dataclass
class Hints:
    """The records of one plane. `_next`: blocks that came while a record is being written."""

    plane: Plane
    naming: Naming
    _next: dict[Owner, tuple[Digest, ...]] = field(default_factory=dict)
    _under_way: set[Owner] = field(default_factory=set)

    def note(self, session: str, namespace: str, chain: tuple[Digest, ...]) -> None:
        """A request of this session has these blocks: its record owns them from now on, and lives on."""
        owner = (namespace, name_of(session))
        if owner in self._under_way:
            self._next[owner] = _joined(chain, self._next.get(owner, ()), self.plane.settings.hint_blocks)
            return
        old = self.plane.catalog.named(namespace, SESSION, owner[1], None)
        chain = tuple(takewhile(lambda key: not self.plane.is_condemned(key), chain))  # else it brought back what goes
        if not chain or (old is not None and not old.is_hint):
            return
        if old is None:
            self._make_room(namespace)
        self._under_way.add(owner)
        try:
            self._begin(owner, old, chain)
        except NanoVLLMError:  # too many objects, or its name is just being taken: it stays without a record
            self._under_way.discard(owner)

    def _begin(self, owner: Owner, old: StateObject | None, chain: tuple[Digest, ...]) -> None:
        ttl_ms = int(self.plane.settings.hint_ttl_s * SECOND_MS)
        if old is None:
            new = StateObject(
                state_id=str(new_state_id()), kind=SESSION, namespace=owner[0], name=owner[1], is_hint=True,
                created_ms=self.plane.wall_ms(), ttl_ms=ttl_ms, durable=True,
            )  # fmt: skip
        else:
            new = msgspec.structs.replace(old, generation=old.generation + 1)
        whole = _joined(chain, () if old is None else old.chain, self.plane.settings.hint_blocks)
        action, started = "hint" if old is None else "update", self.plane.clock.now_ns()
        pending = Pending(action, started, new, old=old, chain=whole, then=lambda _: self._ended(owner))
        self.naming.storing.begin(pending, payload_of(Session(())))

    def _ended(self, owner: Owner) -> None:
        self._under_way.discard(owner)
        more = self._next.pop(owner, None)
        if more is not None:
            self.note(owner[1], owner[0], more)

    def _make_room(self, namespace: str) -> None:
        """A new record displaces the one that would expire first."""
        catalog = self.plane.catalog
        if catalog.holds(namespace, SESSION, is_hint=True)[0] >= self.plane.settings.hints_per_namespace:
            first = min(catalog.hints_of(namespace), key=lambda o: o.expires_ms or 0)
            self.naming.drop_soon(first, "too many sessions")


def name_of(session: str) -> str:
    """The record's name: the session's own, or a sum of it where that is no name of an object."""
    try:
        return check_name(session, "session_id")
    except InvalidRequestError:
        return f"session-{hashlib.sha256(session.encode(errors='replace')).hexdigest()[:32]}"


def _joined(first: tuple[Digest, ...], second: tuple[Digest, ...], most: int) -> tuple[Digest, ...]:
    """The newer chain, then what the older ones have beside it, as far as there is room."""
    return tuple(dict.fromkeys((*first, *second)))[:most]
