"""CUDA kernels: torch's own matrix products and attention on the GPU, over the same paged plan.

What it is: the set chosen for `cuda`. What it knows nothing about: graphs; capturing
a step needs no change of this interface.
"""

from __future__ import annotations

from nanovllm.kernels.paged import PagedKernels


class CudaKernels(PagedKernels):
    """Batched paged attention; linears by cuBLAS."""

    name = "cuda"
