"""The mover: bytes move on threads of the tiers, the books stay with one.

What it is: one lane per tier and direction, and transfers with a generation and a deadline. What it knows
nothing about: what is moved. Invariants: a transfer ends exactly once, by its report or by its deadline,
on the thread that calls `poll` or `wait`; a report that comes after the deadline is told to `late` and to
nobody else; a lane's queue is bounded, so that a tier that hangs holds up its own lane and no more memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanovllm.core.clock import Clock
from nanovllm.errors import TierError

MAX_QUEUED = 64
POLL_S = 0.02
MILLISECOND = 1_000_000
BUSY = "busy"
Job = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What a lane says of a job: its generation, its result or its error."""

    generation: int
    result: Any = None
    error: TierError | None = None
    started_ns: int = 0
    ended_ns: int = 0


@dataclass(eq=False)
class Transfer:
    """One job under way. `ok` and `reason` are set when it ends; `then` is called once, at that moment.

    `ms`: how long it ran; where it was over its deadline, how long it was waited for.
    """

    generation: int
    deadline_ns: int
    then: Callable[[Transfer], None]
    late: Callable[[Any], None] | None = None
    done: bool = False
    ok: bool = False
    reason: str = ""
    is_full: bool = False
    result: Any = None
    ms: float = 0.0
    started_ns: int = 0


class Lane(Protocol):
    """Runs jobs one after the other."""

    def submit(self, generation: int, job: Job, reports: queue.SimpleQueue[Report]) -> bool:
        """False where the lane is full."""
        ...

    def close(self) -> None:
        """No more jobs."""
        ...


class InlineLane:
    """Runs the job at once, on the caller's thread: for memory, for tests, for a folder opened by a command."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def submit(self, generation: int, job: Job, reports: queue.SimpleQueue[Report]) -> bool:
        """Always room."""
        reports.put(run_job(self._clock, generation, job))
        return True

    def close(self) -> None:
        """Nothing to end."""


class ThreadLane:
    """One daemon thread. One that hangs in a system call is left behind: it ends with the process."""

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock = clock
        self._jobs: queue.Queue[tuple[int, Job, queue.SimpleQueue[Report]] | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name=f"state-{name}", daemon=True)
        self._thread.start()

    def submit(self, generation: int, job: Job, reports: queue.SimpleQueue[Report]) -> bool:
        """False where MAX_QUEUED jobs wait already."""
        try:
            self._jobs.put_nowait((generation, job, reports))
        except queue.Full:
            return False
        return True

    def close(self, timeout_s: float = 2.0) -> None:
        """Finish what is queued, as far as it finishes in time."""
        try:
            self._jobs.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            generation, call, reports = job
            reports.put(run_job(self._clock, generation, call))


@dataclass
class Mover:
    """Transfers under way. Used by one thread."""

    clock: Clock
    late_reports: int = 0
    _pending: dict[int, Transfer] = field(default_factory=dict)
    _overdue: dict[int, Transfer] = field(default_factory=dict)
    _reports: queue.SimpleQueue[Report] = field(default_factory=queue.SimpleQueue)
    _generation: int = 0

    def start(
        self,
        lane: Lane,
        job: Job,
        *,
        deadline_ms: float,
        then: Callable[[Transfer], None],
        late: Callable[[Any], None] | None = None,
    ) -> Transfer:
        """Queue a job; where its lane is full it ends at once, as a failure."""
        self._generation += 1
        now = self.clock.now_ns()
        deadline_ns = now + int(deadline_ms * MILLISECOND)
        transfer = Transfer(self._generation, deadline_ns, then, late, started_ns=now)
        self._pending[transfer.generation] = transfer
        if not lane.submit(transfer.generation, job, self._reports):
            self._end(transfer, BUSY)
        self.poll()
        return transfer

    def promise(self, then: Callable[[Transfer], None]) -> Transfer:
        """A transfer without a job of its own: `keep` ends it when the one that carries it has ended."""
        self._generation += 1
        return Transfer(self._generation, 0, then)

    def keep(self, promise: Transfer, carrier: Transfer) -> None:
        """End a promise as its carrier ended."""
        promise.ok, promise.result, promise.is_full, promise.ms = carrier.ok, None, carrier.is_full, carrier.ms
        promise.done, promise.reason = True, carrier.reason
        promise.then(promise)

    def poll(self) -> None:
        """End what has a report, then what is over its deadline."""
        while not self._reports.empty():
            self._take(self._reports.get())
        self._expire()

    def wait(self, transfer: Transfer) -> Transfer:
        """Until it ends; its deadline bounds that."""
        self.poll()
        while not transfer.done:
            try:
                self._take(self._reports.get(timeout=POLL_S))
            except queue.Empty:
                self._expire()
        return transfer

    def settle(self) -> None:
        """Until nothing is under way, what ended transfers began included."""
        while self._pending:
            self.wait(next(iter(self._pending.values())))

    @property
    def num_pending(self) -> int:
        """Transfers that have not ended."""
        return len(self._pending)

    def _take(self, report: Report) -> None:
        transfer = self._pending.get(report.generation)
        if transfer is None:
            self._take_late(report)
            return
        transfer.ok, transfer.result = report.error is None, report.result
        transfer.ms = (report.ended_ns - report.started_ns) / MILLISECOND
        transfer.is_full = report.error is not None and report.error.code == "tier_full"
        self._end(transfer, "" if report.error is None else report.error.message)

    def _take_late(self, report: Report) -> None:
        self.late_reports += 1
        overdue = self._overdue.pop(report.generation, None)
        if overdue is not None and overdue.late is not None and report.error is None:
            overdue.late(report.result)

    def _expire(self) -> None:
        now = self.clock.now_ns()
        for transfer in [t for t in self._pending.values() if now >= t.deadline_ns]:
            if transfer.done:  # ended by what the one before it set off
                continue
            transfer.ms = (now - transfer.started_ns) / MILLISECOND
            self._overdue[transfer.generation] = transfer
            self._end(transfer, "deadline")

    def _end(self, transfer: Transfer, reason: str) -> None:
        del self._pending[transfer.generation]
        transfer.done, transfer.reason = True, reason
        transfer.then(transfer)


def run_job(clock: Clock, generation: int, job: Job) -> Report:
    """Run it and report, whatever happens: a lane outlives every job."""
    started = clock.now_ns()
    try:
        result, error = job(), None
    except TierError as failure:
        result, error = None, failure
    except Exception as failure:  # noqa: BLE001  (a lane that dies would hang everybody behind it)
        result, error = None, TierError(f"A tier failed: {type(failure).__name__}.")
        error.__cause__ = failure
    return Report(generation, result, error, started, clock.now_ns())
