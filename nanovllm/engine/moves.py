"""Moves: what the tiers did, told to the event bus.

What it is: loads, writes behind and failures as `MoveEvent`s. What it knows nothing about: who reads them. Invariants:
one event a load, one a write, and at most one a tier and step for failures, so that their number is bounded by that of
the steps; without a bus it costs a comparison; nothing exact is derived from them: counters are kept elsewhere.
"""

from __future__ import annotations

from nanovllm.core.events import EventBus
from nanovllm.state.mover import MILLISECOND, Transfer
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane


class Moves:
    """Of one engine. `block_bytes`: what a block has on the device."""

    def __init__(self, events: EventBus | None, plane: Plane, block_bytes: int) -> None:
        self._events, self._plane, self._block_bytes = events, plane, block_bytes
        self._failures = dict.fromkeys(plane.places, 0)

    def load(self, request_id: str, tier: str, num_loaded: int, num_wanted: int, started_ns: int) -> None:
        """A load ended; `num_loaded` of `num_wanted` blocks came."""
        outcome = "done" if num_loaded == num_wanted else "partial" if num_loaded else "failed"
        self._tell("load", tier, outcome, num_loaded, self._plane.clock.now_ns() - started_ns, request_id)

    def refused(self, request_id: str, tier: str) -> None:
        """A load was not begun: computing is cheaper."""
        self._tell("load", tier, "refused", 0, 0, request_id)

    def written(self, tier: str, num_blocks: int, transfer: Transfer) -> None:
        """Blocks were written behind, or could not be."""
        blocks = num_blocks if transfer.ok else 0
        self._tell("write", tier, "done" if transfer.ok else "failed", blocks, int(transfer.ms * MILLISECOND))

    def watch(self) -> None:
        """Tell of tiers that failed since the last call."""
        for name, place in self._plane.places.items():
            if place.counters.failures != self._failures[name]:
                self._failures[name] = place.counters.failures
                self._tell("failure", name, _worst(place), 0, 0)

    def _tell(self, move: str, tier: str, outcome: str, blocks: int, duration_ns: int, request_id: str = "") -> None:
        if self._events is not None:
            size = blocks * self._block_bytes
            self._events.move(
                move, tier, outcome, request_id=request_id, blocks=blocks, size_bytes=size, duration_ns=duration_ns
            )


def _worst(place: Place) -> str:
    states = (place.reads.state, place.writes.state)
    return next(state for state in ("open", "half_open", "closed") if state in states)
