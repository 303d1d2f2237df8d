"""Reclaim: who goes when room is needed, and what becomes of it.

What it is: making room under quotas and watermarks, and the verb `evict`. What it knows nothing about:
scores (policies), who may go (victims), how bytes move (plane). Invariants: nothing that is held goes (a
pin, a write or read under way, a block that others stand behind, the last copy of a text); what is worth
more than loading it costs is moved to the next tier before it goes; every candidate looked at is in a
receipt with its score and its verdict, also where nobody asked by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nanovllm.errors import InvalidRequestError, shown
from nanovllm.state.catalog import Entry
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.objects import KINDS, KVBlock
from nanovllm.state.place import HIGH, LOW, Place
from nanovllm.state.plane import Plane
from nanovllm.state.policies.policy import NEVER
from nanovllm.state.policies.victims import Victims
from nanovllm.state.receipts import SHOWN_CANDIDATES, Candidate, Receipt
from nanovllm.state.tails import SESSION, tails

DEVICE = "device"


@dataclass
class Outcome:
    """What reclaiming did so far."""

    freed_bytes: int = 0
    moved_bytes: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    concerns: list[str] = field(default_factory=list)
    trimmed: set[bytes] = field(default_factory=set)  # that went from the tails of sessions
    tails: dict[str | None, Iterator[Entry]] = field(default_factory=dict)  # of a tenant, what may be trimmed next


@dataclass
class Reclaim:
    """Takes bytes out of tiers. `spill` begins to move an entry's bytes down; told what was done."""

    plane: Plane
    spill: Callable[[Place, Entry], str | None]  # the tier it goes to, None where it is not worth it or not possible

    def make_room(self, place: Place, incoming: int, namespace: str | None = None) -> Outcome | None:
        """Free what `incoming` more bytes need; None where too much of the tier is held."""
        outcome, started = Outcome(), self.plane.clock.now_ns()
        try:
            is_enough = self._freed(place, incoming, namespace, outcome)
        finally:
            self.plane.flush(place)
        if outcome.candidates:
            self._tell(place, outcome, started, is_enough)
        return outcome if is_enough else None

    def _freed(self, place: Place, incoming: int, namespace: str | None, outcome: Outcome) -> bool:
        limit = self.plane.settings.namespace_bytes
        if limit is not None and namespace is not None:
            while place.by_namespace.get(namespace, 0) + incoming > limit:
                if not self._take_one(place, outcome, kinds=list(KINDS), namespace=namespace):
                    return False
        if place.is_over(incoming, HIGH):
            while place.is_over(incoming, LOW) and self._take_one(place, outcome):
                pass
        return not place.is_over(incoming, 1.0)

    def _tell(self, place: Place, outcome: Outcome, started_ns: int, is_enough: bool) -> None:
        """The receipt of room that nobody asked for by name."""
        tails = f", {len(outcome.trimmed)} of them from the tails of sessions" if outcome.trimmed else ""
        rest = "" if is_enough else "; it was not enough: the rest is held"
        self.plane.receipt(
            "reclaim", started_ns, is_enough, f"{len(outcome.candidates)} went to make room{tails}{rest}",
            tier=place.name, size_bytes=outcome.freed_bytes, candidates=outcome.candidates, concerns=outcome.concerns,
            detail={"moved_bytes": outcome.moved_bytes, "trimmed": len(outcome.trimmed)},
        )  # fmt: skip

    def evict(self, policy: str | None, size_bytes: int | None, kind: str | None, tier: str | None) -> Receipt:
        """The verb: `size_bytes` from one tier, or one object."""
        started = self.plane.clock.now_ns()
        if kind is not None and kind not in KINDS:
            raise InvalidRequestError(f"kind must be one of {', '.join(KINDS)}, not {kind!r:.60}.", param="kind")
        if size_bytes is not None and (type(size_bytes) is not int or size_bytes < 0):
            raise InvalidRequestError(f"bytes must be a number from 0 up, not {shown(size_bytes)}.", param="bytes")
        if policy is not None:
            self.plane.make_policy(policy)  # an unknown name is refused here
        name = self._tier_to_evict_from(tier, kind)
        outcome = Outcome()
        if name == DEVICE:
            self._evict_device(outcome, size_bytes, kind)
        elif name is not None:
            self._evict_place(self.plane.places[name], outcome, policy, size_bytes, kind)
            self.plane.flush(self.plane.places[name])
        evicted = sum(c.verdict != "kept" for c in outcome.candidates)
        self._add_kept(outcome, name, kind)
        reason = f"{evicted} of {len(outcome.candidates)} candidates went" if evicted else "nothing may go: all is held"
        enough = bool(evicted) and outcome.freed_bytes >= (size_bytes or 0)
        return self.plane.receipt(
            "evict", started, enough, reason if enough or not evicted else f"{reason}, the rest is held",
            tier=name, size_bytes=outcome.freed_bytes, candidates=outcome.candidates, concerns=outcome.concerns,
            detail={"policy": policy or "each kind's own", "moved_bytes": outcome.moved_bytes},
        )  # fmt: skip

    def _tier_to_evict_from(self, tier: str | None, kind: str | None) -> str | None:
        """The tier that was named, else the fastest one that has a candidate."""
        names = [*([DEVICE] if self.plane.device is not None else []), *self.plane.places]
        if tier is not None:
            if tier not in names:
                raise InvalidRequestError(f"There is no tier {tier!r:.60}.", param="tier", hint=", ".join(names))
            return tier
        for name in names:
            if name == DEVICE and self.plane.device is not None:
                if kind in (None, "kv") and self.plane.device.evictable():
                    return name
            elif any(self.plane.places[name].victims.next_victim(k) for k in ([kind] if kind else KINDS)):
                return name
        return None

    def _evict_place(
        self, place: Place, outcome: Outcome, policy: str | None, size_bytes: int | None, kind: str | None
    ) -> None:
        victims = self._victims(place, policy)
        kinds = [kind] if kind else None
        if size_bytes is not None:
            while outcome.freed_bytes < size_bytes and self._take_one(place, outcome, kinds, victims=victims):
                pass
            return
        first = self._take_one(place, outcome, kinds, victims=victims)
        owners = set() if first is None else set(self.plane.catalog.owners(first.key))
        while first is not None and len(owners) == 1 and first.parent_key is not None:
            parent = self.plane.catalog.entries.get(first.parent_key)
            if parent is None or place.name not in parent.tiers or place.victims.is_held(parent.key):
                return
            if self.plane.catalog.owners(parent.key) != owners:
                return
            self._go(place, parent, outcome, victims)
            first = parent

    def _victims(self, place: Place, policy: str | None) -> Victims[Entry]:
        """The tier's own selection; for another policy one that knows each entry's last use only."""
        in_force = {kind: KIND_TABLE[kind].policy_in(place.name) for kind in KINDS}
        if policy is None or set(in_force.values()) == {policy}:
            return place.victims
        fresh: Victims[Entry] = Victims({kind: self.plane.make_policy(policy) for kind in KINDS})
        entries = [entry for entry in self.plane.catalog.entries.values() if place.name in entry.tiers]
        for entry in sorted(entries, key=lambda entry: entry.last_use):
            fresh.touch(entry, 0, entry.num_tokens, hit=True)
        return fresh

    def _take_one(
        self,
        place: Place,
        outcome: Outcome,
        kinds: list[str] | None = None,
        namespace: str | None = None,
        victims: Victims[Entry] | None = None,
    ) -> Entry | None:
        """The next victim goes; None where nothing may."""
        victims = victims or place.victims
        shares = {name: kind.share for name, kind in KIND_TABLE.items()}
        for kind in kinds or place.kinds_by_excess(shares):
            while (entry := self._next(place, outcome, victims, kind, namespace)) is not None:
                if not place.victims.is_held(entry.key):
                    self._go(place, entry, outcome, victims)
                    return entry
                victims.hold(entry.key)  # held in the tier itself, which a fresh selection does not know
        return None

    def _next(
        self, place: Place, outcome: Outcome, victims: Victims[Entry], kind: str, namespace: str | None
    ) -> Entry | None:
        """The tail of a session before any session; else whom the policy names."""
        if kind == SESSION and victims is place.victims:
            if namespace not in outcome.tails:
                outcome.tails[namespace] = tails(self.plane, place, namespace)
            entry = next(outcome.tails[namespace], None)
            if entry is not None:
                outcome.trimmed.add(entry.key)
                return entry
        return victims.next_victim(kind, namespace)

    def _go(self, place: Place, entry: Entry, outcome: Outcome, victims: Victims[Entry]) -> None:
        score = victims.score(entry)
        lower = self.spill(place, entry)
        if victims is not place.victims:
            victims.evict(entry)
        self.plane.evict(place, entry)
        outcome.freed_bytes += entry.size_bytes
        outcome.moved_bytes += entry.size_bytes if lower else 0
        if lower is not None:
            place.tally.demoted(entry.kind)
        why = "tail of a session" if entry.key in outcome.trimmed else "lowest score"
        verdict, reason = ("moved", f"to {lower}") if lower else ("evicted", why)
        outcome.candidates.append(_candidate(entry, score, verdict, reason))
        outcome.concerns.extend(self.plane.catalog.owners(entry.key))

    def _evict_device(self, outcome: Outcome, size_bytes: int | None, kind: str | None) -> None:
        """Free blocks of the pool, in the engine's own order; `spill` of the device is the engine's."""
        device = self.plane.device
        if device is None or kind not in (None, "kv"):
            return
        for block in device.evictable():
            if outcome.freed_bytes >= (size_bytes or 1):
                return
            if device.discard(block.digest):
                outcome.freed_bytes += device.block_bytes
                outcome.candidates.append(_block_candidate(block, device.block_bytes))
                outcome.concerns.extend(self.plane.catalog.owners(block.digest))

    def _add_kept(self, outcome: Outcome, name: str | None, kind: str | None) -> None:
        """Who stood next, and stays."""
        place = self.plane.places.get(name or "")
        if place is None or len(outcome.candidates) >= SHOWN_CANDIDATES:
            return
        for each in [kind] if kind else KINDS:
            room = SHOWN_CANDIDATES - len(outcome.candidates)
            for score, entry in place.victims.ranked(each, room):
                outcome.candidates.append(_candidate(entry, score, "kept", "higher score"))
                outcome.concerns.extend(self.plane.catalog.owners(entry.key))


def _candidate(entry: Entry, score: float, verdict: str, reason: str) -> Candidate:
    shown = None if score == NEVER else score
    return Candidate(entry.key.hex()[:16], entry.kind, entry.size_bytes, shown, verdict, reason)


def _block_candidate(block: KVBlock, size: int) -> Candidate:
    return Candidate(block.digest.hex()[:16], "kv", size, None, "evicted", "next in the device's order")
