"""The state counter of a running scheduler: what lives at this moment, and how much of the pool it holds.

What it is: the one snapshot that policies, metrics and students' observers read. What it
knows nothing about: what is done with it. Invariant: it changes nothing; it costs a walk
over the running sequences, and nothing where nobody asks.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanovllm.engine.kv_state import KVState
from nanovllm.engine.sequence import Sequence
from nanovllm.observe.statistics import HeldState, StateCount


def count_totals(holders: Iterable[Sequence]) -> tuple[int, int, int]:
    """Live requests, those still prefilling, block table entries: the sums of `count_state`, cheap in each step."""
    held = [seq for seq in holders if seq.block_table]
    return len(held), sum(seq.is_prefilling for seq in held), sum(len(seq.block_table) for seq in held)


def count_state(
    kv: KVState, holders: Iterable[Sequence], block_size: int, *, num_waiting: int = 0, block_bytes: int = 0
) -> StateCount:
    """What `holders` (running and loading sequences) hold of `kv`."""
    held = tuple(
        HeldState(seq.request_id, len(seq.block_table), seq.num_cached_tokens, seq.is_prefilling) for seq in holders
    )
    return StateCount(
        held, kv.num_blocks, kv.num_free_blocks, kv.num_cached_blocks, block_size, block_bytes, num_waiting
    )
