"""Endings: how sequences end, whether they are done, aborted, or struck by an exception.

What it is: the sequences that ended and are not handed over yet, and the two ways an
exception is caught: on behalf of one sequence, which then fails alone, or on nobody's
behalf, which makes the step a bad one. What it knows nothing about: what was being done.
Invariant: whatever is raised while a sequence ends, it does end, and its request hears of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.engine.faults import SequenceFault, StepHealth, blamed, failure
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

    def on_behalf_of(self, seq: Sequence, stage: str) -> EndsAlone:
        """Whatever goes wrong in here fails `seq` and nobody else."""
        return EndsAlone(self, seq, stage)

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


class EndsAlone:
    """A sequence at fault in here fails, and what comes after goes on."""

    __slots__ = ("endings", "seq", "stage")

    def __init__(self, endings: Endings, seq: Sequence, stage: str) -> None:
        self.endings, self.seq, self.stage = endings, seq, stage

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        fault = blamed(self.seq, self.stage, error)
        if fault is not None:
            self.endings.blame(fault)
        return fault is not None
