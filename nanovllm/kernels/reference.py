"""The reference kernels: what every operation means, in plain torch, on any device.

What it is: the page the fast kernels are tested against. What it knows nothing
about: speed. It gathers one sequence at a time and masks explicitly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovllm.kernels.interface import (
    AttentionGeometry,
    AttentionPlan,
    DecoderLayer,
    Grouped,
    Linear,
    StepLayout,
    WholeDecoder,
)


@dataclass(frozen=True)
class ReferencePlan:
    """The step itself: nothing is precomputed."""

    layout: StepLayout
    pool: torch.Tensor
    geometry: AttentionGeometry


class ReferenceKernels:
    """Plain torch."""

    name = "reference"

    def reads_groups(self, dtype: torch.dtype) -> bool:
        """Never: a quantised weight is restored."""
        return False

    def copies_of_weights(self, dtype: torch.dtype) -> int:
        """None."""
        return 0

    def linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        grouped: Grouped | None = None,
        *,
        is_head: bool = False,
    ) -> Linear:
        """Unpacked matrix product."""
        return lambda x: F.linear(x, weight, bias)

    def whole(
        self, layers: Sequence[DecoderLayer], final_norm: torch.Tensor, head: Linear, eps: float
    ) -> WholeDecoder | None:
        """There is none: a decoder is its layers."""
        return None

    def padded(self, ids: torch.Tensor, linear: Linear) -> torch.Tensor:
        """As they are."""
        return ids

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalise in float32, round, then scale: the order of the published models."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One after the other."""
        x = x + delta
        return x, self.rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The two halves of one product."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(a, b) -> (a cos - b sin, b cos + a sin) for the two halves of each head."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def plan(self, layout: StepLayout, pool: torch.Tensor, geometry: AttentionGeometry) -> ReferencePlan:
        """Nothing to prepare."""
        return ReferencePlan(layout, pool, geometry)

    def attention(
        self, plan: AttentionPlan, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotate q and k together, then `attend`."""
        heads, kv_heads = plan.geometry.num_heads, plan.geometry.num_kv_heads
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        q, k = self.rope(qk, cos, sin).split((heads, kv_heads), dim=1)
        return self.attend(plan, layer, q, k, v)

    def attend(
        self, plan: AttentionPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Store, then one sequence after the other: gather its blocks, mask, softmax in float32."""
        assert isinstance(plan, ReferencePlan)
        layout, pool = plan.layout, plan.pool
        count = len(layout.positions)
        pool[layout.slot_blocks, layer, 0, :, layout.slot_offsets] = k[:count]
        pool[layout.slot_blocks, layer, 1, :, layout.slot_offsets] = v[:count]
        out, start = torch.zeros_like(q), 0
        for i, (length, context) in enumerate(zip(layout.query_lens, layout.context_lens, strict=True)):
            keys, values = gather(pool, layer, layout.block_tables[i], int(context))
            out[start : start + length] = attend(q[start : start + length], keys, values, plan.geometry)
            start += int(length)
        return out.flatten(1)


def gather(
    pool: torch.Tensor, layer: int, block_table: torch.Tensor, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's keys and values of one sequence: 2 x [G, context, D], copied out of its blocks."""
    num_blocks = -(-context // pool.shape[4])
    kv = pool[block_table[:num_blocks], layer]  # [blocks, 2, G, block_size, D]
    kv = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
    return kv[0], kv[1]


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, geometry: AttentionGeometry) -> torch.Tensor:
    """q [L, H, D] are the last L of the `context` tokens in keys, values [G, context, D]; returns [L, H, D]."""
    length, context = q.shape[0], keys.shape[1]
    group = geometry.num_heads // geometry.num_kv_heads
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)  # [H, context, D]
    scores = torch.einsum("lhd,hcd->hlc", q.float(), keys.float()) * geometry.scale
    scores = scores.masked_fill(~visible(length, context, geometry.sliding_window, q.device), float("-inf"))
    return torch.einsum("hlc,hcd->lhd", scores.softmax(dim=-1), values.float()).to(q.dtype)


def visible(length: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[length, context] bool: key j may be seen by query i if it is not later, and inside the window."""
    query = torch.arange(context - length, context, device=device)[:, None]
    key = torch.arange(context, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
