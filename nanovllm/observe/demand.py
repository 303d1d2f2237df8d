"""Demand: the blocks that a queue asks for, and which of two limits a wait is for when both hold.

What it is: a scheduler names the limit that it meets first; a cap of one step may stand before a pool that
would have stopped the same request anyway. What it knows nothing about: causes, verdicts. Invariants: a cap
gives its time to the pool only where a record of the same wait tells that blocks were short later, and those
who went first, with the request itself, asked already then for more than was free.
"""

from __future__ import annotations

from bisect import bisect_right
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
        self._queues: dict[int, tuple[list[Rank], list[int]]] = {}

    def binding(self, told: Sequence[WaitEvent], wait: Span) -> list[WaitEvent]:
        """For each refusal told during `wait`, in their order, the one that tells what was waited for."""
        found: list[WaitEvent] = []
        room = None
        for event in reversed(told):
            if event.reason in ROOM:
                room = event
            is_short = room is not None and event.reason in CAPS and self._is_short(event, room.headroom, wait)
            found.append(room if room is not None and is_short else event)
        return found[::-1]

    def _is_short(self, event: WaitEvent, headroom: int, wait: Span) -> bool:
        """Whether all up to and with `wait` asked for more blocks than were free at a refusal."""
        ranks, blocks = self._queue(event)
        place = bisect_right(ranks, _rank(wait))
        return place > 0 and blocks[place - 1] + headroom > event.free_blocks

    def _queue(self, event: WaitEvent) -> tuple[list[Rank], list[int]]:
        """Whoever waits at a refusal, by rank, and the blocks that they ask for up to each."""
        if event.seq not in self._queues:
            at_ns = event.ts_ns
            waiting = [(rank, blocks) for rank, start_ns, blocks in self._waits if start_ns <= at_ns < rank[0]]
            self._queues[event.seq] = ([rank for rank, _ in waiting], list(accumulate(b for _, b in waiting)))
        return self._queues[event.seq]


def _rank(wait: Span) -> Rank:
    return wait.end_ns, wait.seq
