"""Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388), dense.

What it is: where the two families leave Llama's layer. What it knows nothing about:
everything they share with it. Qwen2 adds a bias to q, k and v, which the fused linear
carries. Qwen3 has no bias and normalises each head of q and k before rotation.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.interface import DecoderLayer
from nanovllm.models.decoder import DecoderModel


class Qwen2ForCausalLM(DecoderModel):
    """Llama's layer with a bias on q, k and v (`ModelConfig.attention_bias`)."""


class Qwen3ForCausalLM(DecoderModel):
    """Llama's layer with per-head norms on q and k."""

    def project_qkv(self, layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
        """As in Llama, then q_norm and k_norm over the head dimension."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        q, k, v = super().project_qkv(layer, x).split((heads, kv_heads, kv_heads), dim=1)
        assert layer.q_norm is not None and layer.k_norm is not None
        return torch.cat((self.norm(q, layer.q_norm), self.norm(k, layer.k_norm), v), dim=1)
