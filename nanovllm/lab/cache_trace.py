"""A prefix trace made ready for replay: each prompt as a chain of the blocks that a cache would hold.

What it is: a recorded trace, or part of it, with every distinct block as one object, priced once. What it knows
nothing about: policies, capacities. Invariants: a block is known by all that stands before it and by its namespace,
not by its number alone; a block's parent comes before it in the same prompt; nothing here changes during a replay, so
that all runs share it.

Scale: a trace of large-model traffic is brought to the size of a laptop's model by dividing its lengths and its block
by one number (rounded up); the reuse structure stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nanovllm.core.cost_table import CostTable
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.prefix_trace import TraceRow, check_block_tokens

NS_PER_MS = 10**6
KIND = "kv"


@dataclass(frozen=True, slots=True)
class Block:
    """One block of KV, as policies see it. Every block takes the room of a full one."""

    key: int
    parent_key: int | None
    num_tokens: int
    size_bytes: int
    cost_ms: float
    namespace: str
    kind: str = KIND


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: when it comes, how long it is, which blocks it is made of."""

    at_ns: int
    tokens: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class CacheTrace:
    """All prompts in their order, and what they are. `bytes_per_token` is the KV of one token."""

    prompts: tuple[Prompt, ...]
    block_tokens: int
    scale: int
    bytes_per_token: int
    num_blocks: int
    num_distinct: int

    @property
    def tokens(self) -> int:
        """Prompt tokens."""
        return sum(prompt.tokens for prompt in self.prompts)

    def as_dict(self) -> dict[str, Any]:
        """What it is, as plain data."""
        last_ns = self.prompts[-1].at_ns
        return {
            "requests": len(self.prompts),
            "tokens": self.tokens,
            "blocks": self.num_blocks,
            "distinct_blocks": self.num_distinct,
            "block_tokens": self.block_tokens,
            "bytes_per_token": self.bytes_per_token,
            "length_scale": f"1/{self.scale}",
            "seconds": last_ns / 10**9,
        }


class _Blocks:
    """One object per distinct block: (namespace, parent, number of the trace)."""

    def __init__(self, block_tokens: int, bytes_per_token: int, costs: CostTable) -> None:
        self.block_tokens = block_tokens
        self._size_bytes, self._costs = block_tokens * bytes_per_token, costs
        self.found: dict[tuple[str, int | None, int], Block] = {}

    def chain(self, row: TraceRow, tokens: int) -> Iterator[Block]:
        parent: int | None = None
        for index, number in enumerate(row.hash_ids):
            block = self.found.get((row.namespace, parent, number))
            if block is None:
                before = index * self.block_tokens
                here = min(self.block_tokens, tokens - before)
                cost_ms = self._costs.step_ms([(before, here)])
                block = Block(len(self.found), parent, here, self._size_bytes, cost_ms, row.namespace)
                self.found[row.namespace, parent, number] = block
            yield block
            parent = block.key


def make_cache_trace(
    rows: Iterable[TraceRow],
    hash_block: int,
    costs: CostTable,
    *,
    scale: int = 1,
    bytes_per_token: int = 1,
    limit: int | None = None,
) -> CacheTrace:
    """The first `limit` rows, whose numbers stand for `hash_block` tokens each, scaled down by `scale`.

    Raises InvalidRequestError where the scale does not divide the block, lengths disagree, or there is no row.
    """
    if hash_block % scale:
        raise InvalidRequestError(f"A block of {hash_block} tokens cannot be divided by {scale}.", param="scale")
    blocks, prompts, named = _Blocks(hash_block // scale, bytes_per_token, costs), list[Prompt](), 0
    for row in islice(rows, limit):
        check_block_tokens(row, hash_block)
        tokens = -(-row.input_length // scale)
        prompts.append(Prompt(row.timestamp_ms * NS_PER_MS, tokens, tuple(blocks.chain(row, tokens))))
        named += len(row.hash_ids)
    if not prompts:
        raise InvalidRequestError("The trace has no requests.", param="file")
    return CacheTrace(tuple(prompts), blocks.block_tokens, scale, bytes_per_token, named, len(blocks.found))
