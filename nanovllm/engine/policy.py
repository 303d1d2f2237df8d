"""Policies: who goes first, who goes last, and the knobs of experiment 3.

What it is: one small object that ranks sequences. What it knows nothing about:
blocks, budgets, correctness; those stay in the scheduler, so no policy can break
them. Invariant: `rank` is total (seq_id breaks ties) and constant while a sequence
waits, so a preempted sequence keeps its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.config import EngineConfig
from nanovllm.engine.sequence import Sequence
from nanovllm.observe.statistics import StateCount

Rank = tuple[int, ...]


def first_come(seq: Sequence) -> Rank:
    """FCFS: by arrival."""
    return (seq.seq_id,)


def by_priority(seq: Sequence) -> Rank:
    """Lower `priority` first, then by arrival."""
    return (seq.priority, seq.seq_id)


def shortest_first(seq: Sequence) -> Rank:
    """Shortest prompt first, then by arrival."""
    return (seq.num_prompt_tokens, seq.seq_id)


RANKINGS: dict[str, Callable[[Sequence], Rank]] = {
    "fcfs": first_come,
    "priority": by_priority,
    "sjf": shortest_first,
}


@dataclass(frozen=True)
class SchedulingPolicy:
    """A ranking and the knobs: batch cap, new requests per step, prefill insertion during decode.

    `may_admit` reads the state counter and may keep the head of the line out; it is not asked where nobody
    runs, so it cannot stop the engine.
    """

    rank: Callable[[Sequence], Rank] = first_come
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_new_requests_per_step: int | None = None
    prefill_during_decode: bool = True
    max_prefill_chunk: int | None = None
    mode: str = "mixed"
    max_prefill_beside_decode: int | None = None
    may_admit: Callable[[Sequence, StateCount], bool] | None = None

    @classmethod
    def from_config(cls, config: EngineConfig) -> SchedulingPolicy:
        """The policy that the settings name."""
        return cls(
            RANKINGS[config.policy],
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_new_requests_per_step,
            config.prefill_during_decode,
            config.max_prefill_chunk,
            config.schedule_mode,
            config.max_prefill_beside_decode,
        )

    def queue_key(self, seq: Sequence) -> Rank:
        """The order of waiting and running; requests that only prefill come after all others."""
        return (int(seq.prefill_only), *self.rank(seq))

    def victim(self, candidates: list[Sequence]) -> Sequence:
        """Who is preempted: the one that ranks last."""
        return max(candidates, key=self.queue_key)
