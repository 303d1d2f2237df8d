"""WaitLog: why a sequence is not admitted, told once per change.

What it is: the scheduler's refusals as `WaitEvent`s, for whoever explains a wait
afterwards. What it knows nothing about: ranks, budgets, what could be done about it.
Invariants: it decides nothing; a refusal that repeats step after step is told once, so
a recording grows with what changes and not with how long it lasts.
"""

from __future__ import annotations

from nanovllm.core.events import EventBus
from nanovllm.engine.kv_state import KVState
from nanovllm.engine.sequence import Sequence


class WaitLog:
    """Tells the bus about refusals of one scheduler."""

    def __init__(self, events: EventBus, kv: KVState) -> None:
        self._events, self._kv = events, kv
        self._head: tuple[Sequence, int, str] | None = None
        self._producers: dict[Sequence, Sequence] = {}

    def stopped(self, head: Sequence, reason: str, need_blocks: int = 0, headroom: int = 0) -> None:
        """Admission stopped at `head`; whoever ranks behind it waits with it."""
        told = (head, head.num_preemptions, reason)
        if told != self._head:
            self._head = told
            self._events.wait(head.request_id, reason, need_blocks, headroom, self._kv.num_free_blocks)

    def lacks_room(self, head: Sequence, need_blocks: int, headroom: int) -> None:
        """Blocks are short, or they are there and kept free for the growth of others."""
        reason = "blocks" if need_blocks > self._kv.num_free_blocks else "headroom"
        self.stopped(head, reason, need_blocks, headroom)

    def follows(self, seq: Sequence, producer: Sequence) -> None:
        """`seq` was passed over: `producer` computes its next block right now."""
        if self._producers.get(seq) is not producer:
            self._producers = {s: p for s, p in self._producers.items() if not s.is_finished and not s.block_table}
            self._producers[seq] = producer
            self._events.wait(seq.request_id, "producer", 0, 0, self._kv.num_free_blocks, producer.request_id)

    def preempted(self, victim: Sequence, beneficiary: Sequence | None) -> None:
        """`victim` lost its blocks to `beneficiary`, which may be itself; to None where somebody else asked for it."""
        behind = "" if beneficiary is None else beneficiary.request_id
        need = victim.num_blocks
        self._events.wait(victim.request_id, "preempted", need, 0, self._kv.num_free_blocks, behind)
