"""The invariants of the KV pool and the scheduler, as code that finds the first one broken.

What it is: the check that tests, and an engine with `check_invariants` set, call after
every step. What it knows nothing about: how the state came about. It reads, and raises
`IntegrityError`, which is a defect of ours and never a user's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus


class IntegrityError(AssertionError):
    """An invariant of the engine does not hold: a bug in this package."""


def check_blocks(manager: BlockManager, seqs: Iterable[Sequence]) -> None:
    """Raise where the block manager's books do not balance against the leases that `seqs` and it hold."""
    seqs = list(seqs)
    free, used = set(manager.free_block_ids), manager.used_block_ids
    _require(len(free) == len(manager.free_block_ids), "a block is free twice")
    _require(not free & used and free | used == set(range(manager.num_blocks)), "free + used != all blocks")
    tables = Counter(block_id for seq in seqs for block_id in seq.block_table)
    holders = tables + Counter(block_id for lease in manager.leases for block_id in lease.block_ids)
    for block in manager.blocks:
        _require(block.ref_count == holders[block.block_id], f"ref_count of block {block.block_id} is wrong")
        _require((block.ref_count > 0) == (block.block_id in used), f"block {block.block_id} is in the wrong set")
        _require(block.hash_value is not None or tables[block.block_id] <= 1, "a private block has two tables")
    _check_index(manager)
    for seq in seqs:
        _check_sequence(manager, seq)


def _check_index(manager: BlockManager) -> None:
    published = {b.hash_value: b.block_id for b in manager.blocks if b.hash_value is not None}
    _require(published == manager.hash_to_block_id, "the map and the blocks disagree about digests")
    for block_id in manager.hash_to_block_id.values():
        _require(len(manager.blocks[block_id].token_ids) == manager.block_size, "a block that is not full is published")


def _check_sequence(manager: BlockManager, seq: Sequence) -> None:
    _require(0 <= seq.num_cached_tokens <= seq.num_tokens, f"{seq.request_id}: more KV than tokens")
    _require(seq.num_cached_tokens <= len(seq.block_table) * manager.block_size, f"{seq.request_id}: KV without blocks")
    holds = seq.status in (SequenceStatus.RUNNING, SequenceStatus.WAITING_FOR_STATE)
    _require(holds or not seq.block_table, f"{seq.request_id}: {seq.status.value}, but holds blocks")
    for i, block_id in enumerate(seq.block_table[: seq.num_cached_tokens // manager.block_size]):
        block = manager.blocks[block_id]
        tokens_fit = block.hash_value is None or block.token_ids == tuple(seq.block(i))
        _require(tokens_fit, f"{seq.request_id}: block {block_id} holds other tokens")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
