"""A whole decoder as one call: decoder.c over panels, and over groups where few rows meet them.

What it is: the tables of addresses that the call walks through. What it knows nothing about: sequences, where
weights come from. Invariants: the operations, their order and their functions are those of models/decoder.py, so
that a step computed either way has the same bits; its team and its scratch serve one call at a time, as an engine makes
them, and no call reads what another one left.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch

from nanovllm.kernels.c_library import ADDRESS, COUNT, REAL, GroupedArgs, PanelArgs, StepArgs
from nanovllm.kernels.compiled_choice import CompiledChoice
from nanovllm.kernels.compiled_plan import CompiledPlan
from nanovllm.kernels.grouped_linear import GroupedLinear
from nanovllm.kernels.interface import AttentionPlan, DecoderLayer, Linear
from nanovllm.kernels.large_pages import LINE_BYTES, large_pages
from nanovllm.kernels.matrix_unit_linear import MatrixUnitLinear
from nanovllm.kernels.panel_linear import PanelLinear
from nanovllm.kernels.team import Team

TOUCHED_BYTES = 64 << 20  # scratch up to here is taken from the system at once, more of it as it is used


class LinearWeights(ctypes.Structure):
    """`linear` of decoder.c, field by field."""

    _fields_ = (("groups", GroupedArgs), ("panels", PanelArgs))


class LayerWeights(ctypes.Structure):
    """`layer_weights` of decoder.c, field by field."""

    _fields_ = (
        *((name, ADDRESS) for name in ("input_norm", "post_norm")),
        *((name, LinearWeights) for name in ("qkv", "out", "gate_up", "down")),
    )


class DecoderWeights(ctypes.Structure):
    """`decoder_weights` of decoder.c, field by field."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerWeights)),
        *((name, COUNT) for name in ("num_layers", "hidden")),
        ("final_norm", ADDRESS),
        ("head", LinearWeights),
        ("eps", REAL),
    )


class DecoderArgs(ctypes.Structure):
    """`decoder_args` of decoder.c, field by field."""

    _fields_ = (
        ("step", ctypes.POINTER(StepArgs)),
        ("team", ADDRESS),
        ("layer_stride", COUNT),
        ("last", ADDRESS),
        ("num_last", COUNT),
        *((name, ADDRESS) for name in ("x", "delta", "normed", "qkv", "attended", "gate_up", "inner", "logits")),
    )


def can_take(layers: Sequence[DecoderLayer], head: Linear) -> bool:
    """Whether every linear lies in panels, and q and k go into attention as they are projected."""
    linears = [part for layer in layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    are_ours = all(isinstance(_panels(linear), PanelLinear) for linear in (*linears, head))
    return are_ours and all(layer.q_norm is None and layer.k_norm is None for layer in layers)


class CompiledDecoder:
    """Steps whose attention is all our own, of up to `most` tokens. Keeps the layers alive that it points into."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        final_norm: torch.Tensor,
        head: Linear,
        eps: float,
        library: ctypes.CDLL,
        most: int | None = None,
    ) -> None:
        self._library, self._alive, self._most = library, (layers, final_norm, head), most
        self._team = Team(library, torch.get_num_threads())
        self.choice = CompiledChoice(self._team)
        self._tables = (LayerWeights * len(layers))(*map(_layer, layers))
        head_weights = _linear(head)
        self._weights = DecoderWeights(
            self._tables, len(layers), len(final_norm), final_norm.data_ptr(), head_weights, eps
        )
        first, hidden = self._tables[0], len(final_norm)
        inner = first.down.panels.inputs  # widths of delta, normed, qkv, attended, gate_up, inner:
        self._widths = (hidden, hidden, first.qkv.panels.outputs, first.out.panels.inputs, 2 * inner, inner)
        self._logits = torch.float32 if head_weights.panels.is_float else final_norm.dtype
        self._rows, self._scratch, self._parts = 0, torch.empty(0), (0,) * len(self._widths)
        self._item_bytes = final_norm.itemsize

    def reserve(self, rows: int) -> None:
        """Room for steps of up to `rows` tokens, kept from step to step: memory costs most when it is first written."""
        rows = min(rows, self._most or rows)
        sizes = [-(-rows * width * self._item_bytes // LINE_BYTES) * LINE_BYTES for width in self._widths]
        self._rows, self._scratch = rows, large_pages(sum(sizes))
        if self._scratch.nbytes <= TOUCHED_BYTES:
            self._scratch.zero_()
        self._parts = tuple(accumulate(sizes[:-1], initial=self._scratch.data_ptr()))

    def takes(self, plan: AttentionPlan) -> bool:
        """Whether nothing of the step attends in torch, and it is not one of too many tokens."""
        if not isinstance(plan, CompiledPlan) or plan.chunks:
            return False
        return 0 < plan.args.num_tokens <= (self._most or plan.args.num_tokens)

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan, last: torch.Tensor
    ) -> torch.Tensor:
        """Logits [M, vocab]; x is used up."""
        assert isinstance(plan, CompiledPlan)
        step, pool = plan.args, plan.pool
        step.threads = self._team.threads
        step.kv, step.cos, step.sin = pool.data_ptr(), cos.data_ptr(), sin.data_ptr()
        if len(x) > self._rows:
            self.reserve(len(x))
        ctypes.memset(self._parts[0], 0, len(x) * self._widths[0] * self._item_bytes)  # delta
        logits = x.new_empty(len(last), self._weights.head.panels.outputs, dtype=self._logits)
        rows = (last.data_ptr(), len(last))
        addresses = (x.data_ptr(), *self._parts, logits.data_ptr())
        args = DecoderArgs(ctypes.pointer(step), self._team.address, pool.stride(1), *rows, *addresses)
        self._library.run_decoder(ctypes.byref(self._weights), ctypes.byref(args))
        return logits


def _layer(layer: DecoderLayer) -> LayerWeights:
    linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return LayerWeights(layer.input_norm.data_ptr(), layer.post_norm.data_ptr(), *map(_linear, linears))


def _linear(linear: Linear) -> LinearWeights:
    panels, few = _panels(linear), _few(linear)
    assert isinstance(panels, PanelLinear)
    groups = few.args() if isinstance(few, GroupedLinear) else GroupedArgs()
    return LinearWeights(groups, panels.args())


def _panels(linear: Linear) -> Linear:
    """What computes more rows than meet groups."""
    few = _few(linear)
    return few.many if isinstance(few, GroupedLinear) else few


def _few(linear: Linear) -> Linear:
    """What is our own of it."""
    return linear.few if isinstance(linear, MatrixUnitLinear) else linear
