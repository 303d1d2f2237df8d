"""A workload against an engine, offline: each request at its time, each turn after the one before.

What it is: the loop that submits what is due and steps the engine. What it knows nothing
about: how plans are made, which runner answers, what the outputs mean. It works the same on a
real clock and on a virtual one; only waiting differs.

Invariants: every planned request ends in exactly one of `finals`, `refused`, `skipped` (its history never came
about); a request arrives at its planned moment even where a step was under way; nobody else uses the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from nanovllm.core.clock import Clock, VirtualClock
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import Segment
from nanovllm.engine.driver import IDLE_S
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput, StepOutput
from nanovllm.errors import NanoVLLMError
from nanovllm.lab.workloads import PlannedRequest, Workload


@dataclass
class WorkloadRun:
    """How the requests of one run ended, by request id. Times are of the engine's clock."""

    start_ns: int
    finals: dict[str, RequestOutput] = field(default_factory=dict)
    refused: dict[str, NanoVLLMError] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    end_ns: int = 0


def run_workload(
    engine: LLMEngine, workload: Workload, *, after_step: Callable[[list[StepOutput]], None] = lambda outputs: None
) -> WorkloadRun:
    """Serve the whole workload; `after_step` sees what each step handed over. Greedy, full output lengths."""
    return _Runner(engine, workload, after_step).run()


def wait_until(clock: Clock, at_ns: int) -> None:
    """Let time pass: a virtual clock is moved, a real one is waited for."""
    left_ns = max(0, at_ns - clock.now_ns())
    if isinstance(clock, VirtualClock):
        clock.advance(left_ns)
    else:
        time.sleep(left_ns / 1e9)


class _Runner:
    """One run."""

    def __init__(self, engine: LLMEngine, workload: Workload, after_step: Callable[[list[StepOutput]], None]) -> None:
        self._engine, self._clock, self._after_step = engine, engine.clock, after_step
        self._run = WorkloadRun(engine.clock.now_ns())
        self._live: dict[str, PlannedRequest] = {}
        self._waiting_for: dict[str, list[PlannedRequest]] = {}  # the ended request -> who comes after it
        self._due: list[tuple[int, int, PlannedRequest]] = []  # a heap; the number keeps the plan's order
        self._numbers = count()
        for request in workload.requests:
            if request.after is None:
                self._push(request, self._run.start_ns + (request.arrival_ns or 0))
            else:
                self._waiting_for.setdefault(request.after, []).append(request)

    def run(self) -> WorkloadRun:
        while self._due or self._live:
            self._submit()
            if self._live:
                self._step()
            elif self._due:
                wait_until(self._clock, self._due[0][0])
        self._run.end_ns = self._clock.now_ns()
        return self._run

    def _push(self, request: PlannedRequest, due_ns: int) -> None:
        heappush(self._due, (due_ns, next(self._numbers), request))

    def _submit(self) -> None:
        """Everything whose time has come, with the arrival it was planned for."""
        while self._due and self._due[0][0] <= self._clock.now_ns():
            due_ns, _, request = heappop(self._due)
            try:
                self._engine.add_request(
                    self._prompt(request),
                    SamplingParams(temperature=0.0, max_tokens=request.output_len, ignore_eos=True),
                    request_id=request.request_id,
                    namespace=request.namespace,
                    arrival_ns=due_ns,
                )
                self._live[request.request_id] = request
            except NanoVLLMError as error:
                self._run.refused[request.request_id] = error
                self._release_followers(request.request_id, self._clock.now_ns())

    def _prompt(self, request: PlannedRequest) -> list[Segment]:
        own = [Segment(part.name, list(part.token_ids)) for part in request.parts]
        if not request.continues or request.after is None:
            return own
        before = self._run.finals[request.after]
        return [Segment("history", before.prompt_token_ids + before.token_ids), *own]

    def _step(self) -> None:
        outputs = self._engine.step()
        for output in outputs:
            if output.final is not None and output.request_id in self._live:
                self._end(output.final)
        self._after_step(outputs)
        if not outputs:
            self._engine.health.raise_if_stuck()
            if self._engine.is_waiting_for_state():
                wait_until(self._clock, self._clock.now_ns() + int(IDLE_S * 1e9))

    def _end(self, final: RequestOutput) -> None:
        del self._live[final.request_id]
        self._run.finals[final.request_id] = final
        self._release_followers(final.request_id, final.timeline.last_handover_ns or self._clock.now_ns())

    def _release_followers(self, request_id: str, ended_ns: int) -> None:
        """Who came after it comes now; a next turn whose history does not exist never comes, nor those behind it."""
        final = self._run.finals.get(request_id)
        has_history = final is not None and final.error is None
        for follower in self._waiting_for.pop(request_id, []):
            if follower.continues and not has_history:
                self._run.skipped.append(follower.request_id)
                self._release_followers(follower.request_id, ended_ns)
            else:
                self._push(follower, ended_ns + follower.delay_ns)
