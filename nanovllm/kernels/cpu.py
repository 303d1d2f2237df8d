"""CPU kernels: weights packed once for oneDNN, fused norms, batched paged attention.

What it is: the fast set for x86 and Arm processors, without a compiler. What it
knows nothing about: models. oneDNN reorders a weight into the layout its matrix
product reads best; where torch was built without it the plain product is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels.interface import Grouped, Linear
from nanovllm.kernels.packed_linear import PackedLinear
from nanovllm.kernels.paged import PagedKernels
from nanovllm.kernels.reference import ReferenceKernels


class CpuKernels(PagedKernels):
    """Packed linears; a norm in one call."""

    name = "cpu"

    def linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        grouped: Grouped | None = None,
        *,
        is_head: bool = False,
    ) -> Linear:
        """`weight` is copied into oneDNN's layout; the caller may drop its own copy."""
        if not _can_pack(weight.dtype):
            return ReferenceKernels.linear(self, weight, bias)
        return PackedLinear(weight, bias)

    def copies_of_weights(self, dtype: torch.dtype) -> int:
        """In oneDNN's layout."""
        return 1

    def padded(self, ids: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Up to the next number of rows that is compiled anyhow, here once rather than in every linear."""
        missing = linear.rows(len(ids)) - len(ids) if isinstance(linear, PackedLinear) else 0
        return torch.cat((ids, ids[:1].expand(missing))) if missing else ids

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """torch's fused norm, float32 inside."""
        return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _can_pack(dtype: torch.dtype) -> bool:
    """oneDNN multiplies bfloat16 only where the instruction set, as it may be capped, has AVX-512 or better."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
