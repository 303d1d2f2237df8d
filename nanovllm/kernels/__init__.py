"""How the model is computed. One interface, several implementations, parity-tested against `reference`."""

from __future__ import annotations

from nanovllm.kernels.interface import AttentionPlan, Kernels
from nanovllm.kernels.selection import choose_device, choose_dtype, choose_kernels

__all__ = ["AttentionPlan", "Kernels", "choose_device", "choose_dtype", "choose_kernels"]
