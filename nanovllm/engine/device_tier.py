"""The device tier: the KV pool as one tensor, sized from a budget, readable as bytes.

What it is: the memory behind block ids. What it knows nothing about: who holds a
block. The pool is [blocks, layers, 2, kv_heads, block_size, head_dim]: one block is
contiguous over its layers, so moving it is one copy, and already lies in the
canonical order of stored state, [layer][k|v][kv_head][token][dim].
Invariant: the pool starts as zeros; padding that attention gathers is finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.config import LIMITS
from nanovllm.errors import ConfigError, InvalidRequestError, OutOfMemoryError
from nanovllm.kernels.large_pages import large_pages
from nanovllm.models.model_config import ModelConfig

DEFAULT_SHARE = 0.25  # of free memory, where nobody names a budget
DEFAULT_CEILING = 4 * 2**30
MAX_BLOCKS = LIMITS["num_blocks"]


@dataclass(frozen=True)
class PoolSize:
    """The pool's arithmetic; `str` prints it."""

    config: ModelConfig
    block_size: int
    dtype_bytes: int
    budget_bytes: int
    num_blocks: int
    source: str

    @property
    def block_bytes(self) -> int:
        """2 * layers * kv_heads * block_size * head_dim * bytes per number."""
        return block_bytes(self.config, self.block_size, self.dtype_bytes)

    def __str__(self) -> str:
        c = self.config
        return (
            f"KV pool: {self.budget_bytes:,} bytes ({self.source}) / "
            f"(2 x {c.num_layers} layers x {c.num_kv_heads} KV heads x {self.block_size} tokens x {c.head_dim} "
            f"x {self.dtype_bytes} B = {self.block_bytes:,} bytes a block) "
            f"= {self.num_blocks:,} blocks = {self.num_blocks * self.block_size:,} tokens"
        )


def block_bytes(config: ModelConfig, block_size: int, dtype_bytes: int) -> int:
    """Bytes of one block over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim * dtype_bytes


def size_pool(
    config: ModelConfig,
    block_size: int,
    dtype_bytes: int,
    *,
    budget_bytes: int | None,
    num_blocks: int | None,
    free_bytes: int,
    useful_tokens: int,
) -> PoolSize:
    """How many blocks the pool gets: those asked for, those the budget holds, or a share of free memory.

    Without a budget, no more than `useful_tokens` are provided for. Raises ConfigError where the
    budget holds no block, OutOfMemoryError where the machine has less memory than was asked for.
    """
    size = block_bytes(config, block_size, dtype_bytes)
    if num_blocks is not None:
        budget, source = num_blocks * size, "num_blocks"
    elif budget_bytes is not None:
        budget, source = budget_bytes, "kv_memory"
    else:
        useful = -(-useful_tokens // block_size) * size
        budget, source = min(int(free_bytes * DEFAULT_SHARE), DEFAULT_CEILING, useful), "from free memory"
    if budget < size:
        raise ConfigError(
            f"kv_memory of {budget:,} bytes holds no block of {size:,} bytes.",
            param="kv_memory",
            hint="Give more memory, or a smaller block_size.",
        )
    if budget // size > MAX_BLOCKS:
        raise ConfigError(
            f"kv_memory of {budget:,} bytes makes {budget // size:,} blocks; at most {MAX_BLOCKS:,} are managed.",
            param="kv_memory",
            hint="Give less memory, or a larger block_size.",
        )
    if budget > free_bytes:
        raise OutOfMemoryError(
            f"The KV pool needs {budget:,} bytes; {free_bytes:,} are free.",
            param="kv_memory",
            hint="Lower kv_memory, or num_blocks.",
        )
    return PoolSize(config, block_size, dtype_bytes, budget, budget // size, source)


class DeviceTier:
    """The pool and its bytes."""

    def __init__(self, size: PoolSize, dtype: torch.dtype, device: torch.device) -> None:
        c = size.config
        shape = (size.num_blocks, c.num_layers, 2, c.num_kv_heads, size.block_size, c.head_dim)
        self.pool = _zeros(shape, dtype, device)
        self.block_bytes = size.block_bytes
        # On the CPU blocks move as plain memory: a tensor's copy of this size waits for all threads of the kernels.
        on_cpu = device.type == "cpu"
        self._rows = self.pool.view(torch.uint8).view(size.num_blocks, -1).numpy() if on_cpu else None

    def read_block(self, block_id: int) -> bytes:
        """The block's bytes in canonical order. Raises InvalidRequestError on an id outside the pool."""
        block = self._block(block_id)
        if self._rows is not None:
            return self._rows[block_id].tobytes()
        return block.contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def write_block(self, block_id: int, data: bytes) -> None:
        """Overwrite a block that the caller holds. Raises InvalidRequestError unless `data` is exactly one block."""
        if len(data) != self.block_bytes:
            raise InvalidRequestError(f"A block has {self.block_bytes} bytes, not {len(data)}.", param="data")
        block = self._block(block_id)
        if self._rows is not None:
            self._rows[block_id] = np.frombuffer(data, np.uint8)
            return
        numbers = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(block.dtype)
        block.copy_(numbers.view(block.shape))

    def _block(self, block_id: int) -> torch.Tensor:
        if not 0 <= block_id < self.pool.shape[0]:
            raise InvalidRequestError(f"There is no block {block_id}.", param="block_id")
        return self.pool[block_id]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that the CPU takes from the system untouched: a page costs time and memory once it is written.

    `torch.zeros` writes them all; a pool of 4 GiB then takes seconds to start. They begin with a page: keys that lie
    across the processor's cache lines cost a decode step an eighth of its time (dev/LOG.md).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return large_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
