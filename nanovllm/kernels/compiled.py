"""CPU kernels with hand-written loops: kernels.c called through ctypes, which releases the GIL.

What it is: linears over panels, norms, SiLU, rotation with KV writes, and attention that reads
blocks in place: units of keys for sequences of one query, tiles of queries for chunks of a prompt.
Where a processor multiplies matrices (AMX), bfloat16 of many rows is torch's, which uses it. What it knows
nothing about: compilers. Invariants: threads are torch's, as many as torch uses (but see
whole_decoder.py); what a token's result depends on is the tokens before it, never its neighbours
in the step, how its prompt was cut into chunks of two tokens and more or the number of threads;
but in bfloat16 up to two rows may meet grouped weights, and more the rounded ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from nanovllm.kernels import c_library
from nanovllm.kernels.c_library import DEFINES, StepArgs
from nanovllm.kernels.compiled_plan import CompiledPlan
from nanovllm.kernels.cpu import CpuKernels
from nanovllm.kernels.grouped_linear import GroupedLinear, can_group
from nanovllm.kernels.interface import (
    AttentionGeometry,
    AttentionPlan,
    DecoderLayer,
    Grouped,
    Linear,
    StepLayout,
    WholeDecoder,
)
from nanovllm.kernels.large_pages import LargePages
from nanovllm.kernels.matrix_unit_linear import FEW_ROWS, MatrixUnitLinear
from nanovllm.kernels.openmp import parallel
from nanovllm.kernels.paged import PagedPlan, attend_chunk, prefill_chunks
from nanovllm.kernels.panel_linear import PanelLinear, can_panel
from nanovllm.kernels.whole_decoder import CompiledDecoder, can_take

LANES, CHUNK, MAX_GROUP, MAX_DIM, MAX_ROWS = 16, 256, 16, 256, 384  # as in the sources in C
NO_TILES = torch.empty(0, dtype=torch.int64)
LONG_CHUNK = 32  # tokens from which on AMX may pay; not measured


class CompiledKernels(CpuKernels):
    """Raises CompileError where kernels.c cannot be compiled, for the flags `instructions` or else for this machine."""

    name = "compiled"

    def __init__(self, instructions: list[str] | None = None) -> None:
        self._libraries = {dtype: c_library.load(dtype, instructions) for dtype in DEFINES}
        self._parallel, self._pages = parallel(), LargePages()
        self.has_matrix_unit = torch.cpu._is_amx_tile_supported()

    def linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        grouped: Grouped | None = None,
        *,
        is_head: bool = False,
    ) -> Linear:
        """In panels; few rows in bfloat16 from the groups of a quantised file, where there are any.

        oneDNN's where the build has no product of such elements, and many rows where the processor multiplies matrices.
        """
        library, dtype = self._libraries[weight.dtype], torch.float32 if is_head else weight.dtype
        if not can_panel(weight, library):
            return super().linear(weight, bias)
        own: Linear = PanelLinear(weight, bias, library, self._parallel, self._pages, dtype)
        groups = grouped() if grouped is not None and self.reads_groups(weight.dtype) else None
        if groups is not None and can_group(groups):
            own = GroupedLinear(groups, bias, own, library, self._parallel, self._pages, dtype)
        return MatrixUnitLinear(own, super().linear(weight, bias)) if self._uses_unit(weight.dtype) else own

    def padded(self, ids: torch.Tensor, linear: Linear) -> torch.Tensor:
        """As oneDNN wants it, where that computes the step."""
        if isinstance(linear, MatrixUnitLinear) and len(ids) > FEW_ROWS:
            linear = linear.many
        return super().padded(ids, linear)

    def copies_of_weights(self, dtype: torch.dtype) -> int:
        """Panels, and beside them oneDNN's layout where that multiplies many rows."""
        return 2 if self._uses_unit(dtype) and self._libraries[dtype].panel_width() > 0 else 1

    def _uses_unit(self, dtype: torch.dtype) -> bool:
        return self.has_matrix_unit and dtype == torch.bfloat16

    def reads_groups(self, dtype: torch.dtype) -> bool:
        """In bfloat16, where it lies in panels: float32 has one product for any number of rows."""
        return dtype == torch.bfloat16 and self._libraries[dtype].panel_width() > 0

    def whole(
        self, layers: Sequence[DecoderLayer], final_norm: torch.Tensor, head: Linear, eps: float
    ) -> WholeDecoder | None:
        """One call, where all weights lie in panels."""
        if not can_take(layers, head):
            return None
        most = FEW_ROWS if self._uses_unit(final_norm.dtype) else None
        return CompiledDecoder(layers, final_norm, head, eps, self._libraries[final_norm.dtype], most)

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
        tokens = (layout.slot_blocks, layout.slot_offsets, layout.block_tables.contiguous())
        longest = LONG_CHUNK - 1 if self._uses_unit(pool.dtype) else int(layout.query_lens.max())
        chunks = prefill_chunks(layout, pool, geometry, shortest=longest + 1)
        decodes, units, tiles = *_decodes(layout, geometry), _tiles(layout, group, dim, longest)
        args = StepArgs(
            len(layout.positions), len(decodes[0]), len(units[0]), geometry.num_heads, geometry.num_kv_heads, dim,
            pool.shape[4], pool.stride(0), layout.block_tables.shape[1], geometry.sliding_window or 0,
            *(column.data_ptr() for column in (*tokens, *decodes, *units)), len(tiles[0]),
            *(column.data_ptr() for column in tiles), self._parallel, torch.get_num_threads(), geometry.scale,
        )  # fmt: skip
        return CompiledPlan(pool, geometry, args, (*tokens, *decodes, *units, *tiles), chunks)

    def attention(
        self, plan: AttentionPlan, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """One call rotates, stores and attends; q and k of `qkv` are rotated in place."""
        if isinstance(plan, PagedPlan):
            return super().attention(plan, layer, qkv, cos, sin)
        assert isinstance(plan, CompiledPlan)
        args, pool = plan.args, plan.pool
        qkv = qkv.contiguous()
        out = qkv.new_empty(qkv.shape[0], plan.geometry.num_heads, args.dim)
        out[args.num_tokens :] = 0
        args.qkv, args.out = qkv.data_ptr(), out.data_ptr()
        args.kv = pool.data_ptr() + layer * pool.stride(1) * pool.element_size()
        args.cos, args.sin = cos.data_ptr(), sin.data_ptr()
        self._libraries[qkv.dtype].attend_layer(ctypes.byref(args))
        for chunk in plan.chunks:
            span = slice(chunk.start, chunk.stop)
            out[span] = attend_chunk(pool, plan.geometry, layer, chunk, qkv[span, : plan.geometry.num_heads])
        return out.flatten(1)


def _decodes(layout: StepLayout, geometry: AttentionGeometry) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Sequences of one query; the units of work that their keys make, with room for the units' results."""
    decodes = np.flatnonzero(layout.query_lens == 1)
    contexts = layout.context_lens[decodes]
    units = _chunk_counts(contexts, geometry.sliding_window)
    first_units = np.concatenate(([0], np.cumsum(units)))
    rows = (np.cumsum(layout.query_lens) - 1)[decodes]
    unit_seqs = np.repeat(np.arange(len(decodes)), units)
    partial = torch.empty(int(first_units[-1]) * geometry.num_heads * (geometry.head_dim + 2))
    sequences = tuple(map(torch.from_numpy, (decodes, rows, contexts)))
    return sequences, (torch.from_numpy(unit_seqs), torch.from_numpy(first_units), partial)


def _most_rows(dim: int) -> int:
    """Rows of a tile: whole bands of six whose numbers, in whole registers, fit NUMBERS of prefill.h."""
    return MAX_ROWS * 64 // (-(-dim // 64) * 64) // 6 * 6


def _tiles(layout: StepLayout, group: int, dim: int, longest: int) -> tuple[torch.Tensor, ...]:
    """Chunks up to `longest` in pieces that attend together, most work first: sequence, first row, tokens, position."""
    if not (layout.query_lens > 1).any():
        return (NO_TILES,) * 4
    size = _most_rows(dim) // group
    starts = np.cumsum(layout.query_lens) - layout.query_lens
    chunks = np.flatnonzero((layout.query_lens > 1) & (layout.query_lens <= longest))
    pieces = -(-layout.query_lens[chunks] // size)
    seqs = np.repeat(chunks, pieces)
    offsets = size * (np.arange(len(seqs)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    counts = np.minimum(size, layout.query_lens[seqs] - offsets)
    positions = (layout.context_lens - layout.query_lens)[seqs] + offsets
    order = np.argsort(-positions * counts)
    return tuple(torch.from_numpy(column[order]) for column in (seqs, starts[seqs] + offsets, counts, positions))


def _chunk_counts(contexts: np.ndarray, window: int | None) -> np.ndarray:
    """Chunks of CHUNK keys, counted from a sequence's first token, that its visible keys lie in."""
    first = np.maximum(contexts - window, 0) if window else np.zeros_like(contexts)
    return -(-contexts // CHUNK) - first // CHUNK
