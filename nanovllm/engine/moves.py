"""Moves: what the tiers did, told to the event bus.

What it is: loads, writes behind and failures as `MoveEvent`s. What it knows nothing about: who reads them. Invariants:
one event a load, one a write, and at most one a tier and step for failures, so that their number is bounded by that of
the steps; without a bus it costs a comparison; nothing exact is derived from them: counters are kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nanovllm.core.digest import Digest
from nanovllm.core.events import EventBus
from nanovllm.engine.load_plan import LoadPlan
from nanovllm.state.mover import MILLISECOND, Transfer
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane


class Moves:
    """Of one engine. `block_bytes`: what a block has on the device."""

    def __init__(self, events: EventBus | None, plane: Plane, block_bytes: int) -> None:
        self._events, self._plane, self._block_bytes = events, plane, block_bytes
        self._failures = {name: self._failures_of(place) for name, place in plane.places.items()}

    def load(self, request_id: str, plan: LoadPlan, num_loaded: int, started_ns: int) -> None:
        """A load ended; so many of the plan's blocks came. The tier is that of the first one."""
        outcome = "done" if num_loaded == len(plan.blocks) else "partial" if num_loaded else "failed"
        took_ns = self._plane.clock.now_ns() - started_ns
        self._tell("load", plan.tiers[0], outcome, self._kinds(plan.digests), num_loaded, took_ns, request_id)

    def refused(self, request_id: str, plan: LoadPlan) -> None:
        """A load was not begun: computing is cheaper."""
        self._tell("load", plan.tiers[0], "refused", self._kinds(plan.digests), request_id=request_id)

    def written(self, tier: str, digests: Sequence[Digest], transfer: Transfer) -> None:
        """Blocks were written behind, or could not be."""
        blocks, outcome = (len(digests), "done") if transfer.ok else (0, "failed")
        self._tell("write", tier, outcome, self._kinds(digests), blocks, int(transfer.ms * MILLISECOND))

    def watch(self) -> None:
        """Tell of tiers that failed since the last call."""
        for name, place in self._plane.places.items():
            if place.counters.failures != self._failures[name][""]:
                before, now = self._failures[name], self._failures_of(place)
                self._failures[name] = now
                kinds = [kind for kind in now if kind and now[kind] != before.get(kind, 0)]
                self._tell("failure", name, _worst(place), kinds)

    def _kinds(self, digests: Sequence[Digest]) -> Iterable[str]:
        return () if self._events is None else {self._plane.catalog.kind_of(digest) for digest in digests}

    def _tell(
        self, move: str, tier: str, outcome: str, kinds: Iterable[str], blocks: int = 0, duration_ns: int = 0,
        request_id: str = "",
    ) -> None:  # fmt: skip
        if self._events is not None:
            self._events.move(
                move, tier, outcome, request_id=request_id, blocks=blocks, size_bytes=blocks * self._block_bytes,
                duration_ns=duration_ns, kinds="+".join(sorted(kinds)),
            )  # fmt: skip

    def _failures_of(self, place: Place) -> dict[str, int]:
        """By kind; under no name, all."""
        return {"": place.counters.failures, **{kind: own.failures for kind, own in place.tally.kinds.items()}}


def _worst(place: Place) -> str:
    states = (place.reads.state, place.writes.state)
    return next(state for state in ("open", "half_open", "closed") if state in states)
