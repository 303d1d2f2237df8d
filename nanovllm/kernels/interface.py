"""The kernel interface: the operations a decoder layer is made of.

What it is: the seam between the model's formulas and the machine. What it knows
nothing about: sequences, scheduling, weights' names. Speed work happens behind it
and changes no caller. `reference` is the plain torch meaning of every operation.

Shapes: N tokens of S sequences in one step, H query heads, G KV heads, D head size.
The KV pool is [blocks, layers, 2, G, block_size, D]: a block's bytes are contiguous
over its layers and lie in the canonical order of stored state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm.kernels.grouped_weight import GroupedWeight

Linear = Callable[[torch.Tensor], torch.Tensor]
Grouped = Callable[[], GroupedWeight | None]  # asked for where it is used: taking it apart costs time and memory


@dataclass(frozen=True)
class AttentionGeometry:
    """What attention needs to know of the model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None


@dataclass(frozen=True)
class StepLayout:
    """Where the tokens of one step lie: built once per step, used by every layer. See `ExecBatch`."""

    positions: torch.Tensor  # [N]
    query_lens: NDArray[np.int64]  # [S]
    context_lens: NDArray[np.int64]  # [S]
    block_tables: torch.Tensor  # [S, max_blocks]
    slot_blocks: torch.Tensor  # [N] physical block of each token
    slot_offsets: torch.Tensor  # [N] place inside it


class AttentionPlan(Protocol):
    """What a kernel set prepared for one step; opaque to the model."""

    @property
    def geometry(self) -> AttentionGeometry:
        """What it was made for."""
        ...


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's weights. qkv and gate_up are fused: one matrix product reads the input once."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # [N, hidden] -> [N, (H + 2G) * D]
    out: Linear  # [N, H * D] -> [N, hidden]
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # [N, hidden] -> [N, 2 * intermediate]
    down: Linear  # [N, intermediate] -> [N, hidden]
    q_norm: torch.Tensor | None = None  # [D], Qwen3
    k_norm: torch.Tensor | None = None


class Choice(Protocol):
    """The choice of tokens as one operation, with the meaning that engine/sampler.py has in torch."""

    def __call__(
        self,
        logits: torch.Tensor,
        temperature: NDArray[np.float32],
        min_p: NDArray[np.float32],
        top_p: NDArray[np.float32],
        top_k: NDArray[np.int64],
        noise: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """One token for each row of `logits` [M, vocab], float32, which are used up; -1 where none is finite.

        Columns [M]: temperature 0 takes the likeliest; top_k 0, top_p 1, min_p 0 filter nothing; noise from 0 up to 1.
        """
        ...


class WholeDecoder(Protocol):
    """All layers and the head as one operation, for the steps it takes; and what chooses from its logits."""

    @property
    def choice(self) -> Choice:
        """Chooses in the same threads."""
        ...

    def takes(self, plan: AttentionPlan) -> bool:
        """Whether a step is one of those."""
        ...

    def reserve(self, rows: int) -> None:
        """Make room for steps of up to `rows` tokens; larger ones make their own."""
        ...

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan, last: torch.Tensor
    ) -> torch.Tensor:
        """Logits [M, vocab] of the tokens `last` [M] (rising) of x [N, hidden], the embedded ones, which are used up.

        KV is written as layers do.
        """
        ...


class Kernels(Protocol):
    """One way to compute. Implementations hold no state of any request."""

    name: str

    def reads_groups(self, dtype: torch.dtype) -> bool:
        """Whether linears of this type keep `grouped` beside the weight, and compute few rows from it."""
        ...

    def copies_of_weights(self, dtype: torch.dtype) -> int:
        """How often linears lay a weight of this type out anew; 0 where they use it as it is, shared with a lookup."""
        ...

    def linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        grouped: Grouped | None = None,
        *,
        is_head: bool = False,
    ) -> Linear:
        """A function x [N, in] -> [N, out] over `weight` [out, in], packed as this kernel set likes it.

        `grouped` gives the same weight before it was rounded to `weight`'s type, where a quantised file has it. The
        results are of `weight`'s type; those of a head (`is_head`) may be in float32, where the kernel has them so.
        """
        ...

    def padded(self, ids: torch.Tensor, linear: Linear) -> torch.Tensor:
        """`ids` [N], or with some of them repeated behind: a number of rows that `linear` takes without copies.

        Rows beyond the N of a step's plan are computed with the others, and mean nothing.
        """
        ...

    def whole(
        self, layers: Sequence[DecoderLayer], final_norm: torch.Tensor, head: Linear, eps: float
    ) -> WholeDecoder | None:
        """A decoder of these weights as one operation; None where there is none for them."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension, accumulated in float32 (arXiv 1910.07467)."""
        ...

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta and its `rms_norm`, both [N, hidden]. `x` may become the sum in place."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [N, 2 * F] -> [N, F] (SwiGLU, arXiv 2002.05202)."""
        ...

    def plan(self, layout: StepLayout, pool: torch.Tensor, geometry: AttentionGeometry) -> AttentionPlan:
        """Everything about a step's attention that does not depend on the layer."""
        ...

    def attention(
        self, plan: AttentionPlan, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotate q and k, write k and v into the pool, then attend q over it: [N, H * D].

        qkv [N, H + 2G, D] holds q, k, v side by side and may be changed; cos, sin [N, 1, D / 2] turn the pairs
        (i, i + D / 2) of q and k (arXiv 2104.09864). Rows beyond the plan's N are ignored.
        """
        ...
