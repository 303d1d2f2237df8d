"""Faults: whom an exception is to blame on, and how many steps in a row went wrong.

What it is: the words in which the engine speaks of exceptions that nobody raised on
purpose. What it knows nothing about: what is done with a fault, HTTP. Invariants: what
a client reads names the stage and the kind of exception and nothing else, so no
address, path or text of another request leaks; the exception itself is the cause of
what the request ends with, and is logged.
"""

from __future__ import annotations

import logging

from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ExecutionError, NanoVLLMError

UNHEALTHY_AFTER = 3  # bad steps in a row
logger = logging.getLogger("nanovllm")


class SequenceFault(Exception):
    """Something failed on behalf of one sequence, which alone has to bear it. The cause is what failed."""

    def __init__(self, seq: Sequence, stage: str) -> None:
        super().__init__(f"{stage} of {seq.request_id}")
        self.seq, self.stage = seq, stage


class OnBehalfOf:
    """An exception in here is a SequenceFault of `seq`, unless an inner one has found somebody else at fault."""

    __slots__ = ("seq", "stage")

    def __init__(self, seq: Sequence, stage: str) -> None:
        self.seq, self.stage = seq, stage

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, SequenceFault):
            raise SequenceFault(self.seq, self.stage) from error


def failure(stage: str, error: Exception) -> NanoVLLMError:
    """What a request ends with when `error` struck it: our own errors as they are, others without their text."""
    logger.error("The engine failed at %s.", stage, exc_info=error)
    if isinstance(error, NanoVLLMError):
        return error
    generic = ExecutionError(f"The engine failed at {stage}: {type(error).__name__}.")
    generic.__cause__ = error
    return generic


class StepHealth:
    """Counts bad steps: those whose whole batch failed, or in which an exception had no one sequence to blame."""

    def __init__(self) -> None:
        self.bad_steps_in_a_row = 0
        self.is_bad = self.has_run = False  # the step under way
        self.last_failure: NanoVLLMError | None = None

    def begin(self) -> None:
        """A step begins; nothing is known of it."""
        self.is_bad = self.has_run = False

    def note_bad(self, stage: str, error: Exception) -> NanoVLLMError:
        """The step under way is bad, however many things go wrong in it. Returns the failure for a client."""
        self.bad_steps_in_a_row += not self.is_bad
        self.is_bad = True
        self.last_failure = failure(stage, error)
        return self.last_failure

    def raise_if_stuck(self) -> None:
        """Raise the last failure where step after step nothing can even be scheduled: waiting on would be for ever."""
        if self.last_failure and not self.has_run and self.bad_steps_in_a_row >= UNHEALTHY_AFTER:
            raise self.last_failure

    def note_ran(self) -> None:
        """The batch ran: unless something else went wrong in this step, the row of bad ones is over."""
        self.has_run = True
        if not self.is_bad:
            self.bad_steps_in_a_row = 0
