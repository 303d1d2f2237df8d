"""Capacity arithmetic: cases worked by hand, laws for all numbers, and the engine's own pool as the judge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.observe.capacity import BLOCK_SIZES, KVShape, Pool, RequestShape, StateSize, reserved_concurrency
from tests.engine.helpers import greedy, make_bench

SMOLLM2 = KVShape(num_layers=30, num_kv_heads=3, head_dim=64, dtype_bytes=2)
SMALL = KVShape(num_layers=1, num_kv_heads=1, head_dim=1, dtype_bytes=5)  # 10 bytes a token


def test_smollm2_by_hand() -> None:
    """23,040 bytes a token; 16 of them are 360 KiB; 2,303 tokens need 144 blocks, one slot over."""
    assert SMOLLM2.token_bytes == 23_040
    assert SMOLLM2.formula == "2 x 30 layers x 3 KV heads x 64 head_dim x 2 B = 23,040 B"
    pool, request = Pool(4 * 2**30, 16, SMOLLM2), RequestShape(2048, 256)
    assert (pool.block_bytes, pool.num_blocks) == (360 * 1024, 11_650)
    assert (request.tokens_at_prefill, request.tokens_at_end) == (2048, 2303)
    end = pool.size_of(2303)
    assert (end.blocks, end.bound_tokens, end.bound_bytes) == (144, 1, 23_040)
    assert (pool.concurrency(2048), pool.concurrency(2303)) == (91, 80)  # 11,650 / 128, 11,650 / 144
    assert reserved_concurrency(4 * 2**30, 8192, SMOLLM2) == 22


def test_a_small_pool_by_hand() -> None:
    """107 bytes are 2 blocks of 4 tokens (40 bytes each) and 27 bytes; 5 tokens take both, 3 slots stay empty."""
    pool = Pool(107, 4, SMALL)
    ledger = pool.ledger(5)
    assert (ledger.requests, ledger.live_bytes, ledger.tail_bytes) == (1, 50, 30)
    assert (ledger.left_over_bytes, ledger.uncut_bytes) == (0, 27)
    assert pool.concurrency(9) == 0 and pool.ledger(9).left_over_bytes == 80


def test_sharing_by_hand() -> None:
    """10 blocks of 4; requests of 9 tokens (3 blocks): 3 fit. Sharing 8 tokens leaves 1 block each: 8 fit."""
    pool = Pool(400, 4, SMALL)
    assert pool.concurrency(9) == 3
    assert pool.concurrency(9, shared_tokens=8) == 8
    assert pool.concurrency(9, shared_tokens=7) == (10 - 1) // 2  # the second block is not all shared
    assert pool.concurrency(8, shared_tokens=8) == (10 - 1) // 1  # the block with the last token is never shared


@given(
    tokens=st.integers(1, 10_000),
    block_size=st.integers(1, 300),
    memory=st.integers(1, 10**7),
    shared=st.integers(0, 10_000),
)
def test_laws(tokens: int, block_size: int, memory: int, shared: int) -> None:
    pool = Pool(memory, block_size, SMALL)
    size, ledger = pool.size_of(tokens), pool.ledger(tokens)
    assert 0 <= size.bound_tokens < block_size
    assert size.block_exact_bytes == size.token_exact_bytes + size.bound_bytes
    assert ledger.memory_bytes == memory
    assert min(ledger.live_bytes, ledger.tail_bytes, ledger.left_over_bytes, ledger.uncut_bytes) >= 0
    assert ledger.left_over_bytes < size.block_exact_bytes  # else one more request fitted
    assert pool.concurrency(tokens) <= reserved_concurrency(memory, tokens, SMALL)  # blocks never beat token-exact
    if pool.num_blocks >= size.blocks:
        assert pool.concurrency(tokens, shared) >= pool.concurrency(tokens)


@given(tokens=st.integers(1, 10_000))
def test_larger_blocks_never_waste_less(tokens: int) -> None:
    waste = [StateSize(tokens, size, 1).bound_tokens for size in BLOCK_SIZES]
    assert waste == sorted(waste) and waste[0] == 0


@pytest.mark.parametrize(("prompt", "output"), [(9, 1), (9, 4), (8, 9), (1, 1), (12, 5)])
def test_the_engine_holds_what_the_arithmetic_says(prompt: int, output: int) -> None:
    """The real pool judges: blocks held after the prefill and at the peak."""
    bench = make_bench(num_blocks=32, block_size=4, prefix_mode="off")
    bench.engine.add_request(list(range(1, prompt + 1)), greedy(output))
    held: list[int] = []
    bench.runner.before = lambda batch: held.append(len(bench.manager.used_block_ids))
    bench.drain()
    request = RequestShape(prompt, output)
    assert held[0] == StateSize(request.tokens_at_prefill, 4, 1).blocks
    assert max(held) == StateSize(request.tokens_at_end, 4, 1).blocks
