"""Endings: how sequences end, whether they are done, aborted, or struck by an exception.

What it is: the sequences that ended and are not handed over yet, and the two ways an
exception is caught: on behalf of one sequence, which then fails alone, or on nobody's
behalf, which makes the step a bad one. What it knows nothing about: what was being done.
Invariant: whatever is raised while a sequence ends, it does end, and its request hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from nanovllm.engine.faults import SequenceFault, StepHealth, failure
from nanovllm.engine.request_book import RequestBook
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import NanoVLLMError


class Endings:
    """Ends the sequences of one engine."""

    def __init__(self, scheduler: Scheduler, book: RequestBook) -> None:
        self._scheduler, self._book = scheduler, book
        self.health = StepHealth()
        self.ended: list[Sequence] = []  # since the last emit

    def take(self) -> list[Sequence]:
        """What ended since the last call."""
        ended, self.ended = self.ended, []
        return ended

    def each(self, seqs: Iterable[Sequence], stage: str, act: Callable[[Sequence], None]) -> None:
        """`act` on one after the other: whose act raises fails, and nobody else."""
        for seq in seqs:
            try:
                act(seq)
            except SequenceFault as fault:
                self.blame(fault)
            except Exception as error:  # noqa: BLE001  whatever it raises fails this sequence only
                self.fail(seq, failure(stage, error))

    @contextmanager
    def on_nobodys_behalf(self, stage: str) -> Iterator[None]:
        """Whatever goes wrong in here makes the step a bad one and fails nobody."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  there is no request to fail, and the others must go on
            self.health.note_bad(stage, error)

    def blame(self, fault: SequenceFault) -> None:
        """Fail the sequence at fault with what was raised."""
        assert isinstance(fault.__cause__, Exception)
        self.fail(fault.seq, failure(fault.stage, fault.__cause__))

    def fail(self, seq: Sequence, error: NanoVLLMError) -> None:
        """End a sequence with an error."""
        self._book.note_failure(seq, error)
        self.end(seq, SequenceStatus.FAILED, "error")

    def end(self, seq: Sequence, status: SequenceStatus, reason: str) -> None:
        """End a sequence; the next emit hands it over."""
        self.stop(seq, status, reason)
        self.ended.append(seq)

    def stop(self, seq: Sequence, status: SequenceStatus, reason: str) -> None:
        """Out of the queues, its blocks given back; one that has ended already takes the reason only."""
        if not seq.is_finished:
            with self.on_nobodys_behalf("release"):  # then blocks may be lost, but no request is
                self._scheduler.end(seq, status)
        seq.finish_reason = reason
