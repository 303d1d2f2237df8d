"""Sequence: one request as a runtime state object.

What it is: a request's tokens, status, counters and block table. What it knows nothing about: bytes, scheduling, text.
Interval ledger, between steps:
    [0, num_cached_tokens)                KV is valid, in the blocks of `block_table`
    [num_cached_tokens, num_tokens)       known tokens without KV; the next step computes from here
    [num_prompt_tokens, num_tokens)       the completion
While decoding, num_cached_tokens == num_tokens - 1. `num_scheduled_tokens`: what the step in flight computes, or 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from nanovllm.core.digest import CHAIN_ROOT, ChainLink
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import SegmentSpan
from nanovllm.core.timeline import Timeline
from nanovllm.engine import sequence_state


class SequenceStatus(Enum):
    """Where a sequence stands. The last three are terminal and entered exactly once."""

    WAITING = "waiting"
    WAITING_FOR_STATE = "waiting_for_state"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"
    __hash__ = object.__hash__  # identity, as ==; an Enum hashes the name, in Python


_S = SequenceStatus
_ENDS = frozenset({_S.FINISHED, _S.ABORTED, _S.FAILED})
TRANSITIONS: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    _S.WAITING: frozenset({_S.RUNNING, _S.WAITING_FOR_STATE, _S.ABORTED, _S.FAILED}),
    _S.WAITING_FOR_STATE: frozenset({_S.RUNNING, _S.WAITING, _S.ABORTED, _S.FAILED}),
    _S.RUNNING: frozenset({_S.WAITING, *_ENDS}),
    **dict.fromkeys(_ENDS, frozenset()),
}


@dataclass(eq=False, slots=True)
class Sequence:
    """Identity is the object itself; `seq_id` orders arrivals within one engine."""

    token_ids: list[int]
    sampling_params: SamplingParams
    block_size: int
    request_id: str = ""
    seq_id: int = 0
    index: int = 0  # which of the request's n samples this is
    seed: int = 0
    priority: int = 0  # lower runs first
    prefill_only: bool = False
    max_total_tokens: int = 2**62  # where generation ends at the latest: max_tokens or max_model_len
    namespace: str = ""
    session_id: str = ""  # whose state this is likely to be again; a hint that stays with this engine
    session_owner: str = ""  # the namespace that session is of, where several share one KV; empty: `namespace`
    root_digest: bytes = b""
    eos_token_ids: tuple[int, ...] = ()
    segments: tuple[SegmentSpan, ...] = ()
    timeline: Timeline = field(default_factory=lambda: Timeline(arrival_ns=0))
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None
    num_prompt_tokens: int = -1
    num_cached_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_hit_tokens: int = 0  # the API's cached_tokens: prefix hits of the first admission
    num_potential_hit_tokens: int = 0  # observe-only: what reuse could have hit; never a gain
    num_preemptions: int = 0
    skip_external_state: bool = False  # a load failed: compute instead of asking again
    block_table: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    chain_tip: ChainLink | None = CHAIN_ROOT  # the last published block of its chain; None once the chain broke

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)
        if self.num_prompt_tokens < 0:
            self.num_prompt_tokens = len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion so far."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far; kept across preemption."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_remaining_tokens(self) -> int:
        """Known tokens that have no KV yet."""
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def max_remaining_tokens(self) -> int:
        """How many tokens generation may still add."""
        return self.max_total_tokens - len(self.token_ids)

    @property
    def is_prefilling(self) -> bool:
        """True until prompt KV is complete, and again while a preempted sequence is recomputed."""
        return len(self.token_ids) == self.num_prompt_tokens or len(self.token_ids) - self.num_cached_tokens > 1

    @property
    def is_finished(self) -> bool:
        """True once the sequence has reached any end."""
        return self.status in _ENDS

    @property
    def num_blocks(self) -> int:
        """Blocks that the known tokens occupy: ceil(num_tokens / block_size)."""
        return -(-len(self.token_ids) // self.block_size)

    @property
    def last_block_num_tokens(self) -> int:
        """Tokens in the last block, 1..block_size."""
        return len(self.token_ids) - (self.num_blocks - 1) * self.block_size

    def block(self, i: int) -> list[int]:
        """The tokens of logical block `i`."""
        return self.token_ids[i * self.block_size : (i + 1) * self.block_size]

    def append_token(self, token_id: int) -> None:
        """Add a sampled token; its KV is computed by the next step."""
        self.token_ids.append(token_id)

    def move_to(self, status: SequenceStatus) -> None:
        """Change status along `TRANSITIONS`. Raises RuntimeError on a transition that does not exist."""
        if status not in TRANSITIONS[self.status]:
            raise RuntimeError(f"sequence {self.request_id}: {self.status.value} -> {status.value} is no transition")
        self.status = status

    def __getstate__(self) -> dict[str, object]:
        return sequence_state.resume_view(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        sequence_state.restore(self, state)
