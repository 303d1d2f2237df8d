"""Driver: steps one engine on behalf of several callers that share a thread.

What it is: the loop around `LLMEngine.step`, and a mailbox per request, so that two
interleaved streams each get their own increments. What it knows nothing about: what a
step does. Invariant: when a caller stops listening, its requests are aborted and their
blocks are free again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from nanovllm.engine.faults import StepHealth
from nanovllm.engine.outputs import StepOutput
from nanovllm.errors import RequestNotFoundError

IDLE_S = 0.0005  # between two looks at a load of state that has not arrived


class Stepper(Protocol):
    """The part of an engine this module needs."""

    health: StepHealth

    def step(self) -> list[StepOutput]:
        """One turn."""
        ...

    def flush(self) -> list[StepOutput]:
        """What ended outside a step."""
        ...

    def abort(self, request_id: str) -> bool:
        """End a request."""
        ...

    def is_live(self, request_id: str) -> bool:
        """Not ended, or not handed over to the end."""
        ...

    def is_waiting_for_state(self) -> bool:
        """Nothing can run before a load arrives."""
        ...


class Driver:
    """Turns steps into a stream of increments per caller."""

    def __init__(self, engine: Stepper) -> None:
        self._engine = engine
        self._mail: dict[str, list[StepOutput]] = {}
        self.after_step: list[Callable[[], None]] = []  # called between two steps: live logs, interrupts

    def listen(self, request_ids: Iterable[str]) -> Iterator[StepOutput]:
        """The increments of these requests until each has ended. Leaving early aborts them."""
        open_ids = list(request_ids)
        self._mail |= {request_id: [] for request_id in open_ids}
        try:
            while open_ids:
                for output in [out for request_id in open_ids for out in self._collect(request_id)]:
                    yield output
                    if output.final is not None:
                        open_ids.remove(output.request_id)
                        del self._mail[output.request_id]
                if open_ids:
                    self._pump(open_ids)
        finally:
            self.drop(open_ids)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Abort requests that nobody listens to any more."""
        for request_id in request_ids:
            self._engine.abort(request_id)
            self._mail.pop(request_id, None)
        self._engine.flush()

    def _collect(self, request_id: str) -> list[StepOutput]:
        mail, self._mail[request_id] = self._mail[request_id], []
        return mail

    def _pump(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if not self._mail[request_id] and not self._engine.is_live(request_id):
                raise RequestNotFoundError(f"The request {request_id!r} ended unheard.", param="request_id")
        outputs = self._engine.step()
        if not outputs:
            self._engine.health.raise_if_stuck()
        for call in self.after_step:
            call()
        if not outputs and self._engine.is_waiting_for_state():
            time.sleep(IDLE_S)

    def deliver(self, outputs: list[StepOutput]) -> None:
        """The engine made these, in a step of ours or of anybody else's."""
        for output in outputs:
            if output.request_id in self._mail:
                self._mail[output.request_id].append(output)
