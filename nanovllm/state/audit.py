"""Audit: verify what lies in the tiers, and explain how an object came to be where it is.

What it is: the verbs `verify` and `explain`. What it knows nothing about: how to mend. Invariants: without
`repair` nothing changes; with it, what does not verify goes the way of every failed read: counted, set
aside, missed from then on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nanovllm.state.catalog import Entry
from nanovllm.state.envelope import Label
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.objects import StateObject
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane, opened
from nanovllm.state.receipts import Explanation, Receipt
from nanovllm.state.residency import Residency
from nanovllm.state.steps import Steps

BATCH = 32


@dataclass
class Audit:
    """Reads everything, changes nothing unless asked."""

    plane: Plane
    residency: Residency

    def verify(self, tier: str | None, repair: bool) -> Steps[Receipt]:
        """Every envelope of one tier, or of all, through the same read as any other."""
        started = self.plane.clock.now_ns()
        found: Counter[str] = Counter()
        size = 0
        for place in self.plane.places.values():
            if tier in (None, place.name):
                entries = [entry for entry in self.plane.catalog.entries.values() if place.name in entry.tiers]
                for start in range(0, len(entries), BATCH):
                    size += yield from self._verify(place, entries[start : start + BATCH], found, repair)
        damaged = found.total() - found["sound"]
        reason = f"{found['sound']} sound, {damaged} not" + (", set aside" if damaged and repair else "")
        lost = self._lost() if tier is None else 0
        if lost:
            found["lost"], damaged = lost, damaged + lost
            reason += f"; {lost} objects whose bytes are nowhere: drop them"
        return self.plane.receipt(
            "verify", started, damaged == 0, reason, tier=tier, size_bytes=size, detail=dict(found)
        )

    def explain(self, obj: StateObject) -> Explanation:
        """What is known of it now, and its receipts."""
        receipts, forgotten = self.plane.history.of(obj.state_id)
        kind = KIND_TABLE[obj.kind]
        facts = {
            "kind": obj.kind,
            "label": obj.label,
            "namespace": obj.namespace,
            "generation": obj.generation,
            "durable": obj.durable,
            "tokens": obj.num_tokens,
            "forked_from": obj.forked_from,
            "expires_ms": obj.expires_ms,
            "payload_in": self._tiers_of(self.plane.catalog.entries.get(obj.payload_key)),
            "blocks": len(obj.chain),
            "blocks_in": self._blocks_in(obj),
            "same_model": self.plane.is_known(obj),
            "pins": [{"tier": pin.tier, "until_ns": pin.until_ns} for pin in self.residency.pins_of(obj.state_id)],
            "policies": {name: kind.policy_in(name) for name in self.plane.places},
            "lost_costs": kind.lost,
        }
        return Explanation(obj.state_id, facts, receipts, forgotten)

    def _verify(self, place: Place, entries: list[Entry], found: Counter[str], repair: bool) -> Steps[int]:
        labels = [entry.label for entry in entries if place.name in entry.tiers]
        keys = [label.key for label in labels]

        def job() -> list[bytes | str | None]:
            return [opened(sealed, label) for sealed, label in zip(place.tier.read(keys), labels)]

        deadline = self.plane.settings.write_deadline_ms
        transfer = self.plane.mover.start(place.read_lane, job, deadline_ms=deadline, then=lambda _: None)
        yield transfer
        results = transfer.result or ["unreadable"] * len(labels)
        rows = [(label, result) for label, result in zip(labels, results) if self._is_here(label, place)]
        bad = [label for label, result in rows if not isinstance(result, bytes)]
        found.update("sound" if isinstance(r, bytes) else (r or "missing") for _, r in rows)
        if repair and bad:
            yield self.plane.read(place, bad)
        return sum(len(result) for _, result in rows if isinstance(result, bytes))

    def _lost(self) -> int:
        """Objects that have a name and nothing behind it: their bytes were set aside, or gone when they were read."""
        objects, entries = self.plane.catalog.objects.values(), self.plane.catalog.entries
        return sum(bool(obj.payload_key) and obj.payload_key not in entries for obj in objects)

    def _is_here(self, label: Label, place: Place) -> bool:
        """Still: what was evicted or dropped meanwhile is no damage."""
        entry = self.plane.catalog.entries.get(label.key)
        return entry is not None and place.name in entry.tiers

    def _tiers_of(self, entry: Entry | None) -> list[str]:
        return [] if entry is None else [name for name in self.plane.places if name in entry.tiers]

    def _blocks_in(self, obj: StateObject) -> dict[str, int]:
        """Blocks per tier; one that lies in two is counted in both."""
        device = self.plane.device
        counts = Counter({"device": sum(device.holds(key) for key in obj.chain)} if device is not None else {})
        for key in obj.chain:
            counts.update(self._tiers_of(self.plane.catalog.entries.get(key)))
        return dict(counts)
