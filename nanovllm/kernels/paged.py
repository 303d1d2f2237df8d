"""Batched paged attention in torch operations, for any device.

What it is: the step's decoding sequences in a few batched calls, its prefill
chunks one by one. What it knows nothing about: how linears are packed. A plan holds
every index a step needs, so a layer does two copies in, two copies out and one
attention call per group. Gathering whole blocks per head moves runs of block_size * D
numbers, which costs a fraction of the attention itself.

Invariant: what a sequence gathers beyond its context is finite, whatever the blocks'
last owners left: a mask weighs it with zero, and zero times NaN would be NaN. So a
block is cleared when its first token is written, and a group's padding repeats the
sequence's own first block.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.kernels.interface import AttentionGeometry, AttentionPlan, StepLayout
from nanovllm.kernels.reference import ReferenceKernels, visible

MERGED_PAST = 512  # keys from which on a chunk's past is attended to apart from the chunk, without a mask (dev/LOG.md)


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of similar length that compute one token each. B of them, T = padded context."""

    rows: torch.Tensor | None  # [B] their places among the step's N tokens; None: all of them, in order
    block_rows: torch.Tensor  # [B * G * T / block_size] rows of the pool as [blocks * layers * 2 * G, ...]
    mask: torch.Tensor  # [B, 1, 1, T] bool: which keys exist and may be seen


@dataclass(frozen=True)
class PrefillChunk:
    """One sequence's chunk: tokens [start, stop) of the step, over `context` keys."""

    start: int
    stop: int
    context: int
    block_rows: torch.Tensor  # [G * blocks]
    mask: torch.Tensor | None  # [L, context] bool; None: causal, after a past that all see where context > L


@dataclass(frozen=True)
class PagedPlan:
    """All indices of one step."""

    num_tokens: int  # N
    pool: torch.Tensor  # [blocks, layers, 2, G, block_size, D]
    geometry: AttentionGeometry
    by_token: torch.Tensor  # [blocks * layers * 2 * G * block_size, D], a view
    write_rows: torch.Tensor  # [N * G] rows of by_token, layer 0, keys
    groups: list[DecodeGroup]
    chunks: list[PrefillChunk]


class PagedKernels(ReferenceKernels):
    """Reference arithmetic, batched attention."""

    name = "paged"

    def plan(self, layout: StepLayout, pool: torch.Tensor, geometry: AttentionGeometry) -> PagedPlan:  # type: ignore[override]
        """Sort the step's sequences into decode groups and prefill chunks and compute their indices."""
        _, layers, _, kv_heads, block_size, head_dim = pool.shape
        _clear_started_blocks(layout, pool)
        heads = torch.arange(kv_heads, device=pool.device)
        write = layout.slot_blocks[:, None] * (layers * 2 * kv_heads) + heads  # [N, G]
        starts = np.cumsum(layout.query_lens) - layout.query_lens
        return PagedPlan(
            num_tokens=len(layout.positions),
            pool=pool,
            geometry=geometry,
            by_token=pool.view(-1, head_dim),
            write_rows=(write * block_size + layout.slot_offsets[:, None]).flatten(),
            groups=[
                _decode_group(layout, pool, geometry, starts, members)
                for members in _similar_lengths(layout, block_size)
            ],
            chunks=prefill_chunks(layout, pool, geometry),
        )

    def attend(
        self, plan: AttentionPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Store first: a prompt's own keys are read back from its blocks like everybody else's."""
        assert isinstance(plan, PagedPlan)
        count = plan.num_tokens
        self._store(plan, layer, k[:count], v[:count])
        if plan.groups and plan.groups[0].rows is None and count == len(q):
            return self._decode(plan, layer, plan.groups[0], q).flatten(1)
        out = torch.empty_like(q)
        out[count:] = 0
        for group in plan.groups:
            rows = slice(count) if group.rows is None else group.rows
            out[rows] = self._decode(plan, layer, group, q[rows])
        for chunk in plan.chunks:
            span = slice(chunk.start, chunk.stop)
            out[span] = attend_chunk(plan.pool, plan.geometry, layer, chunk, q[span])
        return out.flatten(1)

    def _store(self, plan: PagedPlan, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        _, _, _, kv_heads, block_size, head_dim = plan.pool.shape
        first = layer * 2 * kv_heads * block_size
        plan.by_token[first:].index_copy_(0, plan.write_rows, k.reshape(-1, head_dim))
        plan.by_token[first + kv_heads * block_size :].index_copy_(0, plan.write_rows, v.reshape(-1, head_dim))

    def _decode(self, plan: PagedPlan, layer: int, group: DecodeGroup, q: torch.Tensor) -> torch.Tensor:
        """The query heads that share a KV head stand as rows of one small attention: q [B, H, D]."""
        batch, kv_heads = q.shape[0], plan.geometry.num_kv_heads
        keys, values = _gather(plan.pool, layer, group.block_rows, batch)
        grouped = q.view(batch, kv_heads, -1, plan.geometry.head_dim)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=plan.geometry.scale)
        return out.reshape(q.shape)


def attend_chunk(
    pool: torch.Tensor, geometry: AttentionGeometry, layer: int, chunk: PrefillChunk, q: torch.Tensor
) -> torch.Tensor:
    """One sequence's chunk over its own gathered keys: q [L, H, D] -> [L, H, D]."""
    keys, values = _gather(pool, layer, chunk.block_rows, 1)
    if chunk.mask is None and chunk.context > len(q):
        return _merged(q, keys[:, :, : chunk.context], values[:, :, : chunk.context], geometry)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[:, :, : chunk.context],
        values[:, :, : chunk.context],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=geometry.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _merged(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, geometry: AttentionGeometry) -> torch.Tensor:
    """The past without a mask, the chunk causally, each by its share of the softmax's sum: q, returned [L, H, D]."""
    length, heads, dim = q.shape
    past, group = keys.shape[2] - length, geometry.num_heads // geometry.num_kv_heads
    flash, q = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q.transpose(0, 1)
    own = (part[:, :, past:].repeat_interleave(group, 1) for part in (keys, values))
    late, late_sum = flash(q[None], *own, is_causal=True, scale=geometry.scale)
    rows = q.reshape(1, -1, group * length, dim)  # the query heads of a KV head, as rows
    early, early_sum = flash(rows, keys[:, :, :past], values[:, :, :past], scale=geometry.scale)
    share = torch.sigmoid(early_sum.reshape(heads, length, 1) - late_sum.reshape(heads, length, 1))
    out = torch.lerp(late[0].float(), early.reshape(heads, length, dim).float(), share)
    return out.transpose(0, 1).to(q.dtype)


def prefill_chunks(
    layout: StepLayout, pool: torch.Tensor, geometry: AttentionGeometry, shortest: int = 2
) -> list[PrefillChunk]:
    """The step's sequences that compute `shortest` tokens or more."""
    starts = np.cumsum(layout.query_lens) - layout.query_lens
    long = np.flatnonzero(layout.query_lens >= shortest)
    return [_chunk(layout, pool, geometry, int(starts[i]), int(i)) for i in long]


def _gather(pool: torch.Tensor, layer: int, block_rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer, 2 x [batch, G, T, D]."""
    kv_heads, block_size, head_dim = pool.shape[3:]
    by_block = pool.view(-1, block_size * head_dim)
    first = layer * 2 * kv_heads
    keys = by_block[first:].index_select(0, block_rows)
    values = by_block[first + kv_heads :].index_select(0, block_rows)
    return keys.view(batch, kv_heads, -1, head_dim), values.view(batch, kv_heads, -1, head_dim)


def _clear_started_blocks(layout: StepLayout, pool: torch.Tensor) -> None:
    """Zero each sequence's last block if this step starts it and leaves it partly filled."""
    offsets = (layout.context_lens - 1) % pool.shape[4]
    started = (offsets < layout.query_lens) & (offsets < pool.shape[4] - 1)
    if started.any():
        last = torch.from_numpy((np.cumsum(layout.query_lens) - 1)[started]).to(pool.device)
        pool.index_fill_(0, layout.slot_blocks[last], 0)


def _similar_lengths(layout: StepLayout, block_size: int) -> list[np.ndarray]:
    """Decoding sequences by padded length; a group pads its contexts by at most a third."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i in np.flatnonzero(layout.query_lens == 1):
        groups[_padded_blocks(-(-int(layout.context_lens[i]) // block_size))].append(int(i))
    return [np.array(members) for members in groups.values()]


def _padded_blocks(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few groups, little padding."""
    size = 1
    while size < count:
        if size >= 2 and size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def _decode_group(
    layout: StepLayout, pool: torch.Tensor, geometry: AttentionGeometry, starts: np.ndarray, members: np.ndarray
) -> DecodeGroup:
    contexts = layout.context_lens[members]
    used = -(-contexts // pool.shape[4])
    index = torch.from_numpy(members).to(pool.device)
    context = torch.from_numpy(contexts).to(pool.device)[:, None]
    block = torch.arange(int(used.max()), device=pool.device)[None, :]
    tables = layout.block_tables[index, : block.numel()]
    own = torch.where(block < torch.from_numpy(used).to(pool.device)[:, None], tables, tables[:, :1])
    key = torch.arange(block.numel() * pool.shape[4], device=pool.device)[None, :]
    seen = key < context
    if geometry.sliding_window is not None:
        seen = seen & (key >= context - geometry.sliding_window)
    return DecodeGroup(
        rows=None if len(members) == len(layout.query_lens) else torch.from_numpy(starts[members]).to(pool.device),
        block_rows=_block_rows(own, pool),
        mask=seen[:, None, None, :],
    )


def _chunk(layout: StepLayout, pool: torch.Tensor, geometry: AttentionGeometry, start: int, i: int) -> PrefillChunk:
    length, context = int(layout.query_lens[i]), int(layout.context_lens[i])
    merges = context - length >= MERGED_PAST and pool.device.type == "cpu"
    plain = (length == context or merges) and geometry.sliding_window is None
    table = layout.block_tables[i : i + 1, : -(-context // pool.shape[4])]
    mask = None if plain else visible(length, context, geometry.sliding_window, pool.device)
    return PrefillChunk(start, start + length, context, _block_rows(table, pool), mask)


def _block_rows(tables: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Rows of the pool, seen as [blocks * layers * 2 * G, block_size * D], that hold layer 0's keys of block
    tables [B, n], ordered [B, G, n]."""
    _, layers, _, kv_heads, _, _ = pool.shape
    heads = torch.arange(kv_heads, device=pool.device)[None, :, None]
    return (tables[:, None, :] * (layers * 2 * kv_heads) + heads).flatten()
