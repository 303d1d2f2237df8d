"""A capacity question and its answer as one plain document, from which people's tables and --json are made.

What it is: `CapacityQuestion` and `document`. What it knows nothing about: terminals,
model files. Invariants: every section carries its label; what sharing would allow
stands apart, as potential; a figure that approximates stands beside its bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nanovllm.observe.capacity import (
    BLOCK_SIZES,
    LABEL,
    KVShape,
    Ledger,
    Pool,
    RequestShape,
    StateSize,
    reserved_concurrency,
)

SHARING_NOTE = (
    "potential, not a realised gain: at most so many fit if every request begins with the same tokens "
    "and finds them resident"
)


@dataclass(frozen=True)
class CapacityQuestion:
    """One pool, one kind of request."""

    model: str
    dtype: str
    shape: KVShape
    request: RequestShape
    memory_bytes: int
    """What KV may take."""
    block_size: int
    max_model_len: int
    """What an allocator that reserves for the longest request reserves."""
    shared_prefix: int = 0

    @property
    def pool(self) -> Pool:
        """The memory cut into blocks."""
        return Pool(self.memory_bytes, self.block_size, self.shape)


def document(question: CapacityQuestion) -> dict[str, Any]:
    """Everything the arithmetic says."""
    request, pool = question.request, question.pool
    report: dict[str, Any] = {
        "label": LABEL,
        "model": {"name": question.model, "dtype": question.dtype, **asdict(question.shape)},
        "kv_bytes_per_token": question.shape.token_bytes,
        "formula": question.shape.formula,
        "pool": {
            "memory_bytes": pool.memory_bytes,
            "block_size": pool.block_size,
            "block_bytes": pool.block_bytes,
            "num_blocks": pool.num_blocks,
        },
        "request": {
            "prompt": request.prompt,
            "output": request.output,
            "after_prefill": _size(pool.size_of(request.tokens_at_prefill)),
            "at_end": _size(pool.size_of(request.tokens_at_end)),
        },
        "concurrency": _concurrency(question),
        "ledger": _ledger(pool.ledger(request.tokens_at_end)),
        "block_sizes": [_row(question, size) for size in BLOCK_SIZES],
    }
    if question.shared_prefix:
        report["sharing"] = _sharing(question)
    return report


def _size(size: StateSize) -> dict[str, int]:
    return {
        "tokens": size.tokens,
        "token_exact_bytes": size.token_exact_bytes,
        "blocks": size.blocks,
        "block_exact_bytes": size.block_exact_bytes,
        "bound_bytes": size.bound_bytes,
        "bound_tokens": size.bound_tokens,
    }


def _concurrency(question: CapacityQuestion) -> dict[str, int]:
    """From the theoretical figure down to the one that an allocator for the worst case reaches."""
    request, pool, shape = question.request, question.pool, question.shape
    return {
        "token_exact_after_prefill": reserved_concurrency(pool.memory_bytes, request.tokens_at_prefill, shape),
        "token_exact_at_end": reserved_concurrency(pool.memory_bytes, request.tokens_at_end, shape),
        "paged_after_prefill": pool.concurrency(request.tokens_at_prefill),
        "paged_at_end": pool.concurrency(request.tokens_at_end),
        "reserve_max": reserved_concurrency(pool.memory_bytes, question.max_model_len, shape),
        "reserve_max_tokens": question.max_model_len,
    }


def _ledger(ledger: Ledger) -> dict[str, Any]:
    return {**asdict(ledger), "used_share": round(ledger.used_share, 6)}


def _row(question: CapacityQuestion, block_size: int) -> dict[str, Any]:
    """What one block size makes of the same memory and requests."""
    pool = Pool(question.memory_bytes, block_size, question.shape)
    tokens = question.request.tokens_at_end
    size = pool.size_of(tokens)
    return {
        "block_size": block_size,
        "num_blocks": pool.num_blocks,
        "blocks_per_request": size.blocks,
        "empty_slots": size.bound_tokens,
        "after_prefill": pool.concurrency(question.request.tokens_at_prefill),
        "at_end": pool.concurrency(tokens),
        "used_share": round(pool.ledger(tokens).used_share, 6),
        "at_end_shared": pool.concurrency(tokens, question.shared_prefix),
    }


def _sharing(question: CapacityQuestion) -> dict[str, Any]:
    tokens, pool = question.request.tokens_at_end, question.pool
    shared_blocks = min(question.shared_prefix, question.request.prompt - 1) // question.block_size
    return {
        "label": LABEL,
        "note": SHARING_NOTE,
        "shared_prefix": question.shared_prefix,
        "shared_blocks": shared_blocks,
        "shared_tokens": shared_blocks * question.block_size,
        "potential_concurrency_at_end": pool.concurrency(tokens, question.shared_prefix),
    }
