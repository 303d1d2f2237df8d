"""Residency: pins. A user's claim that an object's bytes stay in a tier, for a time.

What it is: the verbs `pin` and `unpin`, and the end of pins. What it knows nothing about: who would be
evicted instead. Invariants: a pin is granted only where all pins together stay within their share of the
tier, and is given back exactly once, by `unpin`, by its time, or with its object; a pin is a standing claim:
what comes later, computed or loaded, is held from then on, also after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.state.migration import BATCH, Migration
from nanovllm.state.mover import MILLISECOND
from nanovllm.state.objects import KVBlock, StateObject
from nanovllm.state.plane import Plane
from nanovllm.state.receipts import Receipt
from nanovllm.state.reclaim import DEVICE
from nanovllm.state.steps import Steps

SECOND_NS = 1_000_000_000
DEVICE_NAMES = ("device", "gpu", "cuda", "cpu")


@dataclass(eq=False)
class Pin:
    """One claim of one object on one tier. `lease`: the device's; `keys`: what is held in another tier."""

    state_id: str
    tier: str
    until_ns: int | None
    keys: tuple[bytes, ...]
    size_bytes: int
    lease: Any = None
    renews: Pin | None = None  # stands until this one has what it claims


@dataclass
class Residency:
    """Who is pinned where."""

    plane: Plane
    migration: Migration
    blocks_of: Callable[[StateObject], Steps[list[KVBlock]]]
    pins: dict[tuple[str, str], Pin] = field(default_factory=dict)
    is_changed: bool = False  # since somebody wrote the claims down

    def pin(self, obj: StateObject, device: str, ttl_s: float | None) -> Steps[Receipt]:
        """Claim, and bring up what is not there; a second pin of an object in a tier renews the first."""
        started = self.plane.clock.now_ns()
        tier = self._tier(device)
        blocks = (yield from self.blocks_of(obj)) if tier == DEVICE else []
        obj = self.plane.catalog.objects.get(obj.state_id, obj)  # with the chain of the present model
        size = self._size(obj, tier)
        refusal = self._refusal(obj, tier, size)
        if refusal:
            return self.plane.receipt("pin", started, False, refusal, obj=obj, tier=tier, size_bytes=size)
        key, until = (obj.state_id, tier), None if ttl_s is None else started + int(ttl_s * SECOND_NS)
        pin = Pin(obj.state_id, tier, until, tuple(self._keys(obj, tier)), size, renews=self.pins.get(key))
        self.pins[key] = pin
        self._hold(pin)
        refusal = yield from self._bring(obj, pin, blocks)
        if self.pins.get(key) is not pin:
            refusal = "it was given back meanwhile"
        elif refusal:
            self._undo(pin)
        elif pin.renews is not None:
            self._give_back(pin.renews)
            pin.renews = None
        self.is_changed = True
        term = "" if ttl_s is None else f", for {ttl_s:g} s"
        reason = refusal or self._held(pin) + term
        return self.plane.receipt("pin", started, not refusal, reason, obj=obj, tier=tier, size_bytes=size)

    def unpin(self, obj: StateObject, device: str | None) -> Receipt:
        """Give claims back: those on one tier, or all."""
        started = self.plane.clock.now_ns()
        tier = DEVICE if device in DEVICE_NAMES else device
        tiers = [t for (state_id, t) in list(self.pins) if state_id == obj.state_id and tier in (None, t)]
        for each in tiers:
            self._release(obj.state_id, each)
        reason = f"given back: {', '.join(tiers)}" if tiers else "it was not pinned"
        return self.plane.receipt("unpin", started, bool(tiers), reason, obj=obj, tier=tier)

    def release_all(self, state_id: str) -> None:
        """The object goes, and its pins with it."""
        for pinned, tier in list(self.pins):
            if pinned == state_id:
                self._release(state_id, tier)

    def note_stored(self, digests: Iterable[bytes]) -> None:
        """Blocks were computed: those of pinned chains are held from now on."""
        new = set(digests)
        for pin in self.pins.values():
            if pin.tier == DEVICE and not new.isdisjoint(pin.keys):
                self._hold_on_device(pin)

    def expire(self) -> None:
        """End the pins whose time is over."""
        now = self.plane.clock.now_ns()
        for (state_id, tier), pin in list(self.pins.items()):
            if pin.until_ns is not None and now >= pin.until_ns:
                self._release(state_id, tier)
                obj = self.plane.catalog.objects.get(state_id)
                self.plane.receipt("unpin", now, True, "its time is over", obj=obj, tier=tier)

    def record(self) -> list[dict[str, Any]]:
        """The claims as plain data: `until_ms` by the wall clock, which goes on while nobody is here."""
        now_ns, now_ms = self.plane.clock.now_ns(), self.plane.wall_ms()
        return [
            {"state_id": pin.state_id, "tier": pin.tier, "until_ms": _later_ms(pin.until_ns, now_ns, now_ms)}
            for pin in self.pins.values()
        ]

    def recall(self, record: list[dict[str, Any]]) -> None:
        """Claims of an earlier process, with the time they have left: what comes up again is held from then on."""
        for row in record:
            obj, tier, until_ms = self.plane.catalog.objects.get(row["state_id"]), row["tier"], row["until_ms"]
            left_ms = None if until_ms is None else int(until_ms) - self.plane.wall_ms()
            if obj is None or (left_ms is not None and left_ms <= 0) or not self._can_hold(obj, tier):
                continue
            until = None if left_ms is None else self.plane.clock.now_ns() + left_ms * MILLISECOND
            pin = self.pins[obj.state_id, tier] = Pin(
                obj.state_id, tier, until, tuple(self._keys(obj, tier)), self._size(obj, tier)
            )
            self._hold(pin)
            self.plane.receipt("pin", self.plane.clock.now_ns(), True, f"kept: {self._held(pin)}", obj=obj, tier=tier)

    def _can_hold(self, obj: StateObject, tier: str) -> bool:
        """Whether there is such a tier now, and the pin stays within their share."""
        return (tier == DEVICE or tier in self.plane.places) and not self._refusal(obj, tier, self._size(obj, tier))

    def pins_of(self, state_id: str) -> list[Pin]:
        """The object's claims."""
        return [pin for pin in self.pins.values() if pin.state_id == state_id]

    def _tier(self, device: str) -> str:
        tier = DEVICE if device in DEVICE_NAMES else device
        if tier != DEVICE and tier not in self.plane.places:
            names = ", ".join([*DEVICE_NAMES, *self.plane.places])
            raise InvalidRequestError(f"There is no tier {device!r:.60}.", param="device", hint=f"There are {names}.")
        return tier

    def _keys(self, obj: StateObject, tier: str) -> list[bytes]:
        return list(obj.chain) if tier == DEVICE else self.plane.catalog.keys_of(obj)

    def _size(self, obj: StateObject, tier: str) -> int:
        device = self.plane.device
        if tier == DEVICE:
            return 0 if device is None else len(obj.chain) * device.block_bytes
        return sum(entry.size_bytes for entry in self.plane.catalog.entries_of(obj))

    def _refusal(self, obj: StateObject, tier: str, size: int) -> str:
        """Why not; empty where the pin can be had."""
        if obj.state_id not in self.plane.catalog.objects:
            return "it was dropped meanwhile"
        if tier == DEVICE:
            if self.plane.device is None:
                return "there is no device here: only an engine has one"
            if not obj.chain:
                return f"it has no full block of {self.plane.settings.block_size} tokens"
            capacity: int | None = self.plane.device.num_blocks * self.plane.device.block_bytes
        else:
            capacity = self.plane.places[tier].tier.quota_bytes
        if capacity is None:
            return ""
        others = sum(pin.size_bytes for key, pin in self.pins.items() if pin.tier == tier and key[0] != obj.state_id)
        room = int(capacity * self.plane.settings.pinned_share)
        if others + size > room:
            return f"{size:,} bytes beside {others:,} pinned ones are more than the {room:,} that pins may hold"
        return ""

    def _hold(self, pin: Pin) -> None:
        """What is there stays; what comes, too: a hold on a key in a tier outlasts its bytes."""
        if pin.tier == DEVICE:
            self._hold_on_device(pin)
            return
        for key in pin.keys:
            self.plane.places[pin.tier].victims.hold(key)

    def _bring(self, obj: StateObject, pin: Pin, blocks: list[KVBlock]) -> Steps[str]:
        """Up, or down, to the tier of the pin; why it did not come, where that refuses the pin."""
        if pin.tier != DEVICE:
            moved = yield from self.migration.migrate(obj, pin.tier, pinned=True)
            return "" if moved.ok else moved.reason
        device = self.plane.device
        missing = [block for block in blocks if device is not None and not device.holds(block.digest)]
        for start in range(0, len(missing), BATCH):
            load = yield from self.migration.fetch(missing[start : start + BATCH])
            payloads = [payload for payload in load.payloads[: load.num_blocks] if payload is not None]
            if device is None or self.pins.get((pin.state_id, pin.tier)) is not pin:
                break
            device.load(load.blocks[: load.num_blocks], payloads)
            self._hold_on_device(pin)
            if load.num_blocks < len(load.blocks):
                break
        return ""

    def _held(self, pin: Pin) -> str:
        device = self.plane.device
        if pin.tier != DEVICE or device is None:
            victims = self.plane.places[pin.tier].victims
            return f"{sum(key in victims for key in pin.keys)} pieces held in {pin.tier}"
        here = sum(device.holds(key) for key in pin.keys)
        rest = "" if here == len(pin.keys) else f"; the other {len(pin.keys) - here} when they are computed"
        return f"{here} of {len(pin.keys)} blocks held on the device{rest}"

    def _hold_on_device(self, pin: Pin) -> None:
        """A new lease on all that is there before the old one goes, so that nothing slips away between."""
        device = self.plane.device
        if device is None:
            return
        old, pin.lease = pin.lease, device.hold([key for key in pin.keys if device.holds(key)], f"pin {pin.state_id}")
        if old is not None:
            device.release(old)

    def _release(self, state_id: str, tier: str) -> None:
        pin = self.pins.pop((state_id, tier), None)
        self.is_changed |= pin is not None
        while pin is not None:
            self._give_back(pin)
            pin = pin.renews

    def _undo(self, pin: Pin) -> None:
        """The pin was refused: the one it was to renew stands."""
        self._give_back(pin)
        if pin.renews is None:
            del self.pins[pin.state_id, pin.tier]
        else:
            self.pins[pin.state_id, pin.tier] = pin.renews

    def _give_back(self, pin: Pin) -> None:
        if pin.tier != DEVICE:
            for key in pin.keys:
                self.plane.places[pin.tier].victims.release(key)
        elif pin.lease is not None and self.plane.device is not None:
            self.plane.device.release(pin.lease)


def _later_ms(until_ns: int | None, now_ns: int, now_ms: int) -> int | None:
    return None if until_ns is None else now_ms + (until_ns - now_ns) // MILLISECOND
