"""Demand: the blocks that a queue asks for, and which of two limits a wait is for when both hold.

What it is: a scheduler names the limit that it meets first; a cap of one step may stand before a pool that
would have stopped the same request anyway. What it knows nothing about: causes, verdicts. Invariants: a cap
gives its time to the pool only where a record of the same wait tells that blocks were short later, where those
who went first, with the request itself, asked already then for more than was free, and where those that the cap
let in until then would all have fitted: it only slowed the filling of the pool. What it held up longer is its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from nanovllm.core.events import WaitEvent
from nanovllm.observe.paths import Replay, Span

ROOM = ("blocks", "headroom")
CAPS = ("new_requests_cap", "token_budget", "batch_cap")
Rank = tuple[int, int]


class Demand:
    """Who waited when, in the order in which they were admitted."""

    def __init__(self, run: Replay) -> None:
        size = run.recording.header.block_size
        pairs = ((path, wait) for path in run.paths.values() for wait in path.waits)
        self._waits = sorted((_rank(w), w.start_ns, -(-p.known_tokens(w.start_ns) // size)) for p, w in pairs)
        self._heads = {event.seq: _rank_at(run, name, event) for name, event in run.waits if event.reason in ROOM}
        self._queues: dict[int, tuple[list[Rank], list[int]]] = {}

    def binding(self, told: Sequence[WaitEvent], wait: Span) -> list[WaitEvent]:
        """For each refusal told during `wait`, in their order, the one that tells what was waited for."""
        found: list[WaitEvent] = []
        room = None
        for event in reversed(told):
            if event.reason in ROOM:
                room = event
            filled = room is not None and event.reason in CAPS and self._only_filled(event, room, wait)
            found.append(room if room is not None and filled else event)
        return found[::-1]

    def _only_filled(self, cap: WaitEvent, room: WaitEvent, wait: Span) -> bool:
        """Whether at `cap` all before the head of `room` would have fitted, and all up to and with `wait` would not."""
        ranks, blocks = self._queue(cap)
        fitted = bisect_left(ranks, self._heads[room.seq])
        place = bisect_right(ranks, _rank(wait))
        if not place or (fitted and blocks[fitted - 1] > cap.free_blocks):
            return False
        return blocks[place - 1] + room.headroom > cap.free_blocks

    def _queue(self, event: WaitEvent) -> tuple[list[Rank], list[int]]:
        """Whoever waits at a refusal, by rank, and the blocks that they ask for up to each."""
        if event.seq not in self._queues:
            at_ns = event.ts_ns
            waiting = [(rank, blocks) for rank, start_ns, blocks in self._waits if start_ns <= at_ns < rank[0]]
            self._queues[event.seq] = ([rank for rank, _ in waiting], list(accumulate(b for _, b in waiting)))
        return self._queues[event.seq]


def _rank(wait: Span) -> Rank:
    return wait.end_ns, wait.seq


def _rank_at(run: Replay, name: str, event: WaitEvent) -> Rank:
    """The rank of the wait in which a head was refused; that of nobody where it is not told."""
    waits = run.paths[name].waits if name in run.paths else []
    return next((_rank(wait) for wait in waits if wait.start_ns <= event.ts_ns < wait.end_ns), (0, 0))
