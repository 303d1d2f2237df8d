"""The decoder-only transformer that Llama and Qwen share, as one forward pass.

    x = embed(tokens)
    per layer:  x += attention(norm(x));  x += mlp(norm(x))
    logits = head(norm(x[last tokens]))           (and of the last layer what follows its attention)

What it is: the formula. What it knows nothing about: how an operation is computed
(`kernels`), which sequence a token belongs to, where its KV lies (`StepLayout`).
Invariant: weights are read once, packed by the kernel set, and never changed.
Families differ in `project_qkv` only; see llama.py and qwen.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels.grouped_weight import GroupedWeight
from nanovllm.kernels.interface import AttentionGeometry, AttentionPlan, DecoderLayer, Kernels, Linear
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weights import WeightSource


class WeightReader:
    """Reads tensors in the compute dtype onto the device, and packs linears."""

    def __init__(self, source: WeightSource, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.kernels, self.dtype, self.device = source, kernels, dtype, device

    def tensor(self, name: str) -> torch.Tensor:
        """A private copy: sources may hand out views of a file."""
        return self.source.get(name).to(device=self.device, dtype=self.dtype, copy=True)

    def linear(self, prefix: str, *parts: str, bias: bool = False) -> Linear:
        """One linear of the weights `parts` stacked along their outputs."""
        weight = torch.cat([self.tensor(f"{prefix}.{part}.weight") for part in parts])
        stacked_bias = torch.cat([self.tensor(f"{prefix}.{part}.bias") for part in parts]) if bias else None
        return self.kernels.linear(weight, stacked_bias, lambda: self.grouped([f"{prefix}.{p}.weight" for p in parts]))

    def grouped(self, names: list[str]) -> GroupedWeight | None:
        """The weights `names`, stacked, as a quantised file has them; None where one of them is none or another."""
        return GroupedWeight.stacked([self.source.grouped(name) for name in names])


class DecoderModel:
    """Llama's layer; subclasses change how q, k and v come about."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.kernels = config, kernels
        reader = WeightReader(source, kernels, dtype, device)
        self.embedding = reader.tensor("model.embed_tokens.weight")  # [vocab, hidden]
        self.layers = [self.read_layer(reader, i) for i in range(config.num_layers)]
        self.final_norm = reader.tensor("model.norm.weight")  # [hidden]
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = self.embedding if config.tie_word_embeddings else reader.tensor(name)
        self.head = kernels.linear(head, None, lambda: source.grouped(name), is_head=True)  # [M, hidden] -> [M, vocab]
        self.whole = kernels.whole(self.layers, self.final_norm, self.head, config.rms_norm_eps)
        self.inv_freq = config.inv_freq().to(device)  # [D / 2]
        self.geometry = AttentionGeometry(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.attention_scale,
            config.sliding_window,
        )

    def read_layer(self, reader: WeightReader, i: int) -> DecoderLayer:
        """Layer `i` by its Hugging Face names."""
        prefix, config = f"model.layers.{i}", self.config
        attention = f"{prefix}.self_attn"
        return DecoderLayer(
            input_norm=reader.tensor(f"{prefix}.input_layernorm.weight"),
            qkv=reader.linear(attention, "q_proj", "k_proj", "v_proj", bias=config.attention_bias),
            out=reader.linear(attention, "o_proj"),
            post_norm=reader.tensor(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=reader.linear(f"{prefix}.mlp", "gate_proj", "up_proj"),
            down=reader.linear(f"{prefix}.mlp", "down_proj"),
            q_norm=reader.tensor(f"{attention}.q_norm.weight") if config.qk_norm else None,
            k_norm=reader.tensor(f"{attention}.k_norm.weight") if config.qk_norm else None,
        )

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, last: torch.Tensor
    ) -> torch.Tensor:
        """token_ids, positions [N]; `last` [M] are the tokens whose successor is wanted. Returns logits [M, vocab]."""
        linear = self.layers[0].qkv
        x = F.embedding(self.kernels.padded(token_ids, linear), self.embedding)  # [N, hidden], or some more rows
        cos, sin = self.rotations(self.kernels.padded(positions, linear))
        if self.whole is not None and self.whole.takes(plan):
            return self.whole(x, cos, sin, plan, last)
        delta = torch.zeros_like(x)  # what the last linear adds to x; summed where x is normalised next
        for i, layer in enumerate(self.layers):
            x, normed = self.add_norm(x, delta, layer.input_norm)
            attended = self.kernels.attention(plan, i, self.project_qkv(layer, normed), cos, sin)  # [N, H * D]
            if i == len(self.layers) - 1:  # what comes after the last attention nobody else reads
                x, attended = x[last], attended[last]
            x, normed = self.add_norm(x, layer.out(attended), layer.post_norm)
            delta = layer.down(self.kernels.silu_mul(layer.gate_up(normed)))
        return self.head(self.add_norm(x, delta, self.final_norm)[1])

    def project_qkv(self, layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values side by side, not yet rotated: [N, H + 2G, D]."""
        return layer.qkv(x).view(x.shape[0], -1, self.config.head_dim)

    def rotations(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of position * inv_freq in float32, 2 x [N, 1, D / 2]. No table: any position will do."""
        angles = (positions[:, None].float() * self.inv_freq)[:, None, :]
        return angles.cos().to(self.embedding.dtype), angles.sin().to(self.embedding.dtype)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm with the model's epsilon."""
        return self.kernels.rms_norm(x, weight, self.config.rms_norm_eps)

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta and its norm; x itself is given up."""
        return self.kernels.add_norm(x, delta, weight, self.config.rms_norm_eps)
