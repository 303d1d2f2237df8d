"""Observers: the engine's side of observe-only probes. Empty unless somebody puts one in.

What it is: the list of observers and the two moments at which they are told. What it
knows nothing about: what they do. Invariants: an observer changes no request and no
schedule; one that raises is taken off, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from nanovllm.core.observer import RequestObserver
from nanovllm.engine.sequence import Sequence, SequenceStatus

logger = logging.getLogger("nanovllm")


class Observers:
    """Those of one engine."""

    def __init__(self) -> None:
        self._observers: list[RequestObserver] = []

    def add(self, observer: RequestObserver) -> None:
        """Tell `observer` of everything that enters from now on."""
        self._observers.append(observer)

    def remove(self, observer: RequestObserver) -> None:
        """Tell it nothing more; one that is not there is none to remove."""
        self._observers = [other for other in self._observers if other is not observer]

    def entered(self, seqs: Iterable[Sequence]) -> None:
        """These were queued."""
        if self._observers:
            for seq in seqs:
                self._tell("entered", seq, seq.token_ids[:])

    def handed_over(self, seq: Sequence) -> None:
        """What is new of `seq` was handed over, which may be its end. The last sampled token never had KV."""
        if self._observers and seq.status is SequenceStatus.FINISHED:
            computed = seq.token_ids[:] if seq.finish_reason == "prefilled" else seq.token_ids[:-1]
            self._tell("finished", seq, computed)

    def _tell(self, what: str, seq: Sequence, token_ids: list[int]) -> None:
        for observer in self._observers:
            try:
                getattr(observer, what)(token_ids, seq.namespace, seq.root_digest)
            except Exception as error:  # noqa: BLE001  whatever it raises, no request may suffer from being observed
                self.remove(observer)
                logger.warning("A %s failed and was taken off: %r", type(observer).__name__, error)
