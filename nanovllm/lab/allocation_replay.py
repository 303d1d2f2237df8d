"""The same requests given to several allocators: who fits when, and what becomes of every slot.

What it is: a replay in ticks, one tick a decode step: whoever is live gets one token, then the
head of the line is admitted while it fits (a prefill takes one tick). No model runs: every figure is `simulated`.
What it knows nothing about: how an allocator works, how long a tick is in reality.

The words are those of the PagedAttention paper (arXiv 2309.06180, figure 3). At each tick every slot is one of
    used      it holds a token's KV
    reserved  given to a request that will fill it later, and to nobody else until then
    internal  internal fragmentation: given to a request that will never fill it; known at its end
    external  external fragmentation: free, and with the other free slots enough for the head of the line, but in
              holes that are each too short for it; only while that head waits
    headroom  free, and enough for the head of the line, but kept so that who is live can grow; only while it waits
    free      free otherwise
Reservation waste is reserved and internal together: what is given out and empty.

Invariants: the six add up to the capacity at every tick; every request ends in exactly one of served and refused;
where somebody cannot grow, the last admitted gives way, keeps its tokens and goes to the front of the line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from nanovllm.lab.allocators import RESERVATIONS, Allocator, Contiguous, Paged
from nanovllm.lab.workloads import Workload

LABEL = "simulated"
NOTE = "One tick is a decode step, a prefill takes one; first come first served; prefix sharing is off"
TICK_NS = 20 * 10**6
KINDS = ("used", "reserved", "internal", "external", "headroom", "free")


@dataclass(frozen=True)
class Demand:
    """One request as the replay sees it. It comes at `tick`, or `delay` ticks after `after` has ended."""

    key: str
    prompt: int
    output: int
    tick: int = 0
    after: str | None = None
    delay: int = 0

    @property
    def final(self) -> int:
        """Tokens it holds in its last step."""
        return self.prompt + self.output - 1


@dataclass(frozen=True)
class Sample:
    """One tick: how many requests hold slots, and every slot by kind."""

    live: int
    waiting: int
    used: int
    reserved: int
    internal: int
    external: int
    headroom: int
    free: int


@dataclass
class Replay:
    """What one allocator made of the demands."""

    allocator: str
    capacity: int
    samples: list[Sample] = field(default_factory=list)
    failed_admissions: int = 0
    """Ticks at which the head of the line asked and got nothing."""
    requests_that_failed: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    preemptions: int = 0

    def summary(self) -> dict[str, Any]:
        """The figures of the table; shares are means over all ticks, or those at which somebody waits."""
        shares = self._shares(self.samples)
        contended = [s for s in self.samples if s.waiting]
        return {
            "label": LABEL,
            "allocator": self.allocator,
            "ticks": len(self.samples),
            "mean_concurrency": fmean(s.live for s in self.samples),
            "max_concurrency": max(s.live for s in self.samples),
            "failed_admissions": self.failed_admissions,
            "requests_that_failed": len(self.requests_that_failed),
            "refused": len(self.refused),
            "served": len(self.served),
            "preemptions": self.preemptions,
            "shares": shares,
            "reservation_waste": shares["reserved"] + shares["internal"],
            "shares_while_somebody_waits": self._shares(contended) if contended else None,
            "max_internal": max(s.internal for s in self.samples) / self.capacity,
            "max_external": max(s.external for s in self.samples) / self.capacity,
        }

    def _shares(self, samples: list[Sample]) -> dict[str, float]:
        return {kind: fmean(getattr(s, kind) for s in samples) / self.capacity for kind in KINDS}


def demands_of(workload: Workload, tick_ns: int = TICK_NS) -> list[Demand]:
    """A workload's plan in ticks."""
    prompts = workload.prompt_lens()
    return [
        Demand(
            request.request_id,
            prompts[request.request_id],
            request.output_len,
            (request.arrival_ns or 0) // tick_ns,
            request.after,
            -(-request.delay_ns // tick_ns),
        )
        for request in workload.requests
    ]


def replay(allocator: Allocator, demands: Iterable[Demand]) -> Replay:
    """Serve all demands, first come first served."""
    return _Replayer(allocator, list(demands)).run()


class _Replayer:
    """One replay. `generated` counts a live or preempted request's tokens; it survives preemption."""

    def __init__(self, allocator: Allocator, demands: list[Demand]) -> None:
        self._allocator, self._done = allocator, Replay(allocator.name, allocator.capacity)
        self._tick = 0
        self._coming = sorted((d for d in demands if d.after is None), key=lambda d: d.tick)
        self._followers: dict[str, list[Demand]] = {}
        for demand in demands:
            if demand.after is not None:
                self._followers.setdefault(demand.after, []).append(demand)
        self._line: deque[Demand] = deque()
        self._live: dict[str, Demand] = {}  # in order of admission
        self._generated: dict[str, int] = {}

    def run(self) -> Replay:
        while self._coming or self._line or self._live:
            self._arrive()
            self._decode()
            is_stuck = self._admit()
            self._sample(is_stuck)
            self._end()
            self._tick += 1
        return self._done

    def _arrive(self) -> None:
        while self._coming and self._coming[0].tick <= self._tick:
            demand = self._coming.pop(0)
            if self._allocator.can_ever(demand.prompt, demand.final):
                self._line.append(demand)
            else:
                self._done.refused.append(demand.key)
                self._release_followers(demand)

    def _decode(self) -> None:
        """One token for everybody who is live; whoever came last gives way where one cannot grow."""
        for key in list(self._live):
            if key not in self._live:
                continue
            while not self._allocator.grow(key, self._tokens_after_step(key)):
                victim = next(reversed(self._live))
                self._preempt(victim)
                if victim == key:
                    break
            else:
                self._generated[key] += 1

    def _admit(self) -> bool:
        """Admit from the head while it fits; True where the head has to wait for room."""
        while self._line:
            head = self._line[0]
            if not self._allocator.admit(head.key, self._tokens_after_step(head.key), head.final):
                self._done.failed_admissions += 1
                self._done.requests_that_failed.add(head.key)
                return True
            self._live[head.key] = self._line.popleft()
            self._generated[head.key] = self._generated.get(head.key, 0) + 1
        return False

    def _tokens_after_step(self, key: str) -> int:
        """Tokens with KV once the next one is sampled: that one has none yet."""
        demand = self._live[key] if key in self._live else self._line[0]
        return demand.prompt + self._generated.get(key, 0)

    def _preempt(self, key: str) -> None:
        self._allocator.release(key)
        self._line.appendleft(self._live.pop(key))
        self._done.preemptions += 1

    def _sample(self, is_stuck: bool) -> None:
        held = {key: self._allocator.held(key) for key in self._live}
        used = sum(demand.prompt + self._generated[key] - 1 for key, demand in self._live.items())
        to_be_used = sum(min(held[key], demand.final) for key, demand in self._live.items())
        external = headroom = 0
        if is_stuck:
            head, known = self._line[0], self._tokens_after_step(self._line[0].key)
            external, headroom = self._allocator.stranded(known, head.final), self._allocator.headroom(known)
        given = sum(held.values())
        empty = (to_be_used - used, given - to_be_used, external, headroom)
        free = self._allocator.capacity - given - external - headroom
        self._done.samples.append(Sample(len(self._live), len(self._line), used, *empty, free))

    def _end(self) -> None:
        for key, demand in list(self._live.items()):
            if self._generated[key] == demand.output:
                self._allocator.release(key)
                del self._live[key]
                self._done.served.append(key)
                self._release_followers(demand)

    def _release_followers(self, ended: Demand) -> None:
        for demand in self._followers.pop(ended.key, []):
            due = Demand(demand.key, demand.prompt, demand.output, self._tick + 1 + demand.delay)
            self._coming.append(due)
            self._coming.sort(key=lambda d: d.tick)


def compare_contiguous(
    workload: Workload, num_blocks: int, block_size: int, *, max_len: int, guess: int
) -> tuple[dict[str, Any], list[Replay]]:
    """The workload under every reservation and under pages, with the same slots: the document, and all samples."""
    capacity, demands = num_blocks * block_size, demands_of(workload)
    allocators: list[Allocator] = [Contiguous(name, capacity, max_len=max_len, guess=guess) for name in RESERVATIONS]
    allocators += [Paged(num_blocks, block_size, keeps_headroom=keeps) for keeps in (True, False)]
    replays = [replay(allocator, demands) for allocator in allocators]
    document = {
        "label": LABEL,
        "note": NOTE,
        "workload": {"name": workload.name, "requests": len(workload.requests), "knobs": workload.knobs.as_dict()},
        "capacity_tokens": capacity,
        "max_len": max_len,
        "guess": guess,
        "allocators": [one.summary() for one in replays],
    }
    return document, replays
