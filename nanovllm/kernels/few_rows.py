"""A whole decoder as one call for steps of few tokens: few_rows.c over grouped weights.

What it is: the tables of addresses that the call walks through. What it knows nothing about: sequences, where
weights come from. Invariants: the operations, their order and their functions are those of models/decoder.py, so
that a step computed either way has the same bits; its team serves one call at a time, as an engine makes them.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence

import torch

from nanovllm.kernels.c_library import ADDRESS, COUNT, REAL, GroupedArgs, StepArgs
from nanovllm.kernels.compiled_plan import CompiledPlan
from nanovllm.kernels.grouped_linear import FEW, GroupedLinear
from nanovllm.kernels.interface import AttentionPlan, DecoderLayer, Linear


class LayerWeights(ctypes.Structure):
    """`layer_weights` of few_rows.c, field by field."""

    _fields_ = (
        *((name, ADDRESS) for name in ("input_norm", "post_norm")),
        *((name, GroupedArgs) for name in ("qkv", "out", "gate_up", "down")),
    )


class DecoderWeights(ctypes.Structure):
    """`decoder_weights` of few_rows.c, field by field."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerWeights)),
        *((name, COUNT) for name in ("num_layers", "hidden")),
        ("final_norm", ADDRESS),
        ("head", GroupedArgs),
        ("eps", REAL),
    )


class FewRowsArgs(ctypes.Structure):
    """`few_rows_args` of few_rows.c, field by field."""

    _fields_ = (
        ("step", ctypes.POINTER(StepArgs)),
        ("team", ADDRESS),
        ("layer_stride", COUNT),
        *((name, ADDRESS) for name in ("x", "delta", "normed", "qkv", "attended", "gate_up", "inner", "logits")),
    )


def can_take(layers: Sequence[DecoderLayer], head: Linear) -> bool:
    """Whether every linear is grouped, and q and k go into attention as they are projected."""
    linears = [part for layer in layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    are_grouped = all(isinstance(linear, GroupedLinear) for linear in (*linears, head))
    return are_grouped and all(layer.q_norm is None and layer.k_norm is None for layer in layers)


class FewRows:
    """Steps of at most `FEW` tokens. Keeps the layers alive that it points into."""

    def __init__(
        self, layers: Sequence[DecoderLayer], final_norm: torch.Tensor, head: Linear, eps: float, library: ctypes.CDLL
    ) -> None:
        self._library, self._alive = library, (layers, final_norm, head)
        self._team = library.team_open(torch.get_num_threads() - 1)
        if self._team is None:
            raise MemoryError("no memory for threads")
        weakref.finalize(self, _close, library, self._team, os.getpid()).atexit = False
        self._tables = (LayerWeights * len(layers))(*map(_weights, layers))
        head_args = _args(head)
        self._weights = DecoderWeights(
            self._tables, len(layers), len(final_norm), final_norm.data_ptr(), head_args, eps
        )
        first = self._tables[0]
        inner = first.down.inputs
        hidden = len(final_norm)  # of delta, normed, qkv, attended, gate_up, inner
        self._widths = (hidden, hidden, first.qkv.outputs, first.out.inputs, 2 * inner, inner)
        self._logits = torch.float32 if head_args.is_float else final_norm.dtype

    def takes(self, plan: AttentionPlan) -> bool:
        """Whether the step has so few tokens that the groups are the faster weights."""
        return isinstance(plan, CompiledPlan) and 0 < plan.args.num_tokens <= FEW

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Logits [N, vocab]; x is used up."""
        assert isinstance(plan, CompiledPlan)
        step, pool = plan.args, plan.pool
        step.kv, step.cos, step.sin = pool.data_ptr(), cos.data_ptr(), sin.data_ptr()
        scratch = [x.new_empty(x.shape[0], width) for width in self._widths]
        scratch[0].zero_()
        logits = x.new_empty(x.shape[0], self._weights.head.outputs, dtype=self._logits)
        addresses = (part.data_ptr() for part in (x, *scratch, logits))
        args = FewRowsArgs(ctypes.pointer(step), self._team, pool.stride(1), *addresses)
        self._library.few_rows(ctypes.byref(self._weights), ctypes.byref(args))
        return logits


def _close(library: ctypes.CDLL, team: int, opened_in: int) -> None:
    """Not at exit, when an engine's thread may be in a call: the threads end with the process. Not in a forked
    child, which has none of them."""
    if os.getpid() == opened_in:
        library.team_close(team)


def _weights(layer: DecoderLayer) -> LayerWeights:
    linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return LayerWeights(layer.input_norm.data_ptr(), layer.post_norm.data_ptr(), *map(_args, linears))


def _args(linear: Linear) -> GroupedArgs:
    assert isinstance(linear, GroupedLinear)
    return linear.args()
