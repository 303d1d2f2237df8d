"""Bursts: waits that a limit caused only because requests came all at once.

What it is: the busy periods of a run, and for each whether it began with most of its arrivals although what is
configured would have kept up with the run's mean arrival rate. What it knows nothing about: causes, verdicts.
Invariant: where all requests come together there is no rate to keep up with, and no burst is told.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from nanovllm.observe.paths import Replay, Span

MIN_ARRIVALS, SHARE, HEAD = 4, 0.5, 0.1  # half of the arrivals within the first tenth of a busy period
Period = tuple[int, int]


class Bursts:
    """The busy periods of one run that are bursts."""

    def __init__(self, run: Replay) -> None:
        self._came = sorted(p.timeline.queued_ns for p in run.paths.values() if p.timeline.queued_ns is not None)
        self._waits = sorted((w.start_ns, w.end_ns) for p in run.paths.values() for w in p.waits if w.stage == "queued")
        self._launches = [step.start_ns for step in run.steps]
        self._periods = [period for period in _joined(self._waits) if self._is_burst(*period)]

    def __contains__(self, wait: Span) -> bool:
        return any(start_ns <= wait.start_ns < end_ns for start_ns, end_ns in self._periods)

    def _is_burst(self, start_ns: int, end_ns: int) -> bool:
        before = bisect_left(self._came, start_ns)
        came = bisect_left(self._came, end_ns) - before
        at_once = bisect_right(self._came, start_ns + int((end_ns - start_ns) * HEAD)) - before
        return came >= MIN_ARRIVALS and at_once >= came * SHARE and self._keeps_up(start_ns, end_ns)

    def _keeps_up(self, start_ns: int, end_ns: int) -> bool:
        """Whether admissions of a busy period, those of its first step left out, come as fast as all arrivals do."""
        first_ns = next((at for at in self._launches if at >= start_ns), end_ns)
        admitted = sum(first_ns < end <= end_ns for start, end in self._waits if start >= start_ns)
        span_ns = self._came[-1] - self._came[0]
        return admitted * span_ns >= (len(self._came) - 1) * (end_ns - start_ns) > 0


def _joined(waits: list[Period]) -> list[Period]:
    """Stretches of time in which somebody waits in the queue for the first time."""
    found: list[Period] = []
    for start_ns, end_ns in waits:
        if found and start_ns <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end_ns))
        else:
            found.append((start_ns, end_ns))
    return found
