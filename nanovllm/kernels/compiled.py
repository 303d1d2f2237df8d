"""CPU kernels with hand-written loops: kernels.c called through ctypes, which releases the GIL.

What it is: norms, SiLU, rotation with KV writes, and decode attention that reads blocks in
place. Prefill chunks attend in torch. What it knows nothing about: compilers. Invariants:
threads are torch's, as many as torch uses; a sequence's result depends on its own length,
never on its neighbours or on the number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.kernels import c_library
from nanovllm.kernels.c_library import DEFINES, StepArgs
from nanovllm.kernels.cpu import CpuKernels
from nanovllm.kernels.interface import AttentionGeometry, AttentionPlan, StepLayout
from nanovllm.kernels.paged import PagedPlan, PrefillChunk, attend_chunk, prefill_chunks

LANES, CHUNK, MAX_GROUP, MAX_DIM = 16, 256, 16, 256  # as in kernels.c


@dataclass(frozen=True)
class CompiledPlan:
    """One step for kernels.c. `args` points into `arrays`."""

    pool: torch.Tensor
    geometry: AttentionGeometry
    chunks: list[PrefillChunk]
    args: StepArgs
    arrays: tuple[torch.Tensor, ...]


class CompiledKernels(CpuKernels):
    """Raises CompileError where kernels.c cannot be compiled."""

    name = "compiled"

    def __init__(self) -> None:
        self._libraries = {dtype: c_library.load(dtype) for dtype in DEFINES}
        self._parallel = c_library.parallel()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """One pass, float32 inside."""
        return self._norm(x.contiguous(), None, weight, eps)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` becomes the sum."""
        return x, self._norm(x, delta.contiguous(), weight, eps)

    def _norm(self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, width = torch.empty_like(x), x.shape[-1]
        self._libraries[x.dtype].add_norm(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // max(width, 1),
            width,
            eps,
            self._parallel,
            torch.get_num_threads(),
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """One pass, float32 inside."""
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        library = self._libraries[gate_up.dtype]
        library.silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width, self._parallel, torch.get_num_threads())
        return out

    def plan(  # type: ignore[override]
        self, layout: StepLayout, pool: torch.Tensor, geometry: AttentionGeometry
    ) -> PagedPlan | CompiledPlan:
        """Units of work for the decoding sequences, indices for the chunks. Odd head sizes are torch's."""
        dim, group = geometry.head_dim, geometry.num_heads // geometry.num_kv_heads
        if dim % LANES or dim > MAX_DIM or group > MAX_GROUP:
            return super().plan(layout, pool, geometry)
        decodes = np.flatnonzero(layout.query_lens == 1)
        units = _chunk_counts(layout.context_lens[decodes], geometry.sliding_window)
        first_units = np.concatenate(([0], np.cumsum(units)))
        arrays = (
            layout.slot_blocks,
            layout.slot_offsets,
            torch.from_numpy((np.cumsum(layout.query_lens) - 1)[decodes]),
            torch.from_numpy(layout.context_lens[decodes]),
            layout.block_tables[torch.from_numpy(decodes)],
            torch.from_numpy(np.repeat(np.arange(len(decodes)), units)),
            torch.from_numpy(first_units),
            torch.empty(int(first_units[-1]) * geometry.num_heads * (dim + 2)),
        )
        args = StepArgs(
            len(layout.positions), len(decodes), int(first_units[-1]), geometry.num_heads, geometry.num_kv_heads, dim,
            pool.shape[4], pool.stride(0), layout.block_tables.shape[1], geometry.sliding_window or 0,
            *(array.data_ptr() for array in arrays), self._parallel, torch.get_num_threads(), geometry.scale,
        )  # fmt: skip
        return CompiledPlan(pool, geometry, prefill_chunks(layout, pool, geometry), args, arrays)

    def attention(
        self, plan: AttentionPlan, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """One call rotates, stores and decodes; q and k of `qkv` are rotated in place."""
        if isinstance(plan, PagedPlan):
            return super().attention(plan, layer, qkv, cos, sin)
        assert isinstance(plan, CompiledPlan)
        args, pool, heads = plan.args, plan.pool, plan.geometry.num_heads
        qkv = qkv.contiguous()
        out = qkv.new_empty(qkv.shape[0], heads, args.dim)
        out[args.num_tokens :] = 0
        args.qkv, args.out = qkv.data_ptr(), out.data_ptr()
        args.kv = pool.data_ptr() + layer * pool.stride(1) * pool.element_size()
        args.cos, args.sin = cos.data_ptr(), sin.data_ptr()
        self._libraries[qkv.dtype].decode_layer(ctypes.byref(args))
        for chunk in plan.chunks:
            span = slice(chunk.start, chunk.stop)
            out[span] = attend_chunk(pool, plan.geometry, layer, chunk, qkv[span, :heads])
        return out.flatten(1)


def _chunk_counts(contexts: np.ndarray, window: int | None) -> np.ndarray:
    """Chunks of CHUNK keys, counted from a sequence's first token, that its visible keys lie in."""
    first = np.maximum(contexts - window, 0) if window else np.zeros_like(contexts)
    return -(-contexts // CHUNK) - first // CHUNK
