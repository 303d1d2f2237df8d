"""The shape of a model, independent of the file format that described it.

What it is: one frozen value from which the forward pass, the KV pool and the weight
check derive every dimension. What it knows nothing about: files, tensors' contents,
devices. Invariant: a `ModelConfig` that exists has sane dimensions and only features
that the forward pass implements; everything else was refused by name before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.errors import ModelFileError
from nanovllm.models import config_gguf, config_hf
from nanovllm.models.rope import RopeScaling, inverse_frequencies

MAX_PARAMETERS = 2**40


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and switches of one decoder-only transformer of the Llama family."""

    architecture: str
    """"llama", "qwen2" or "qwen3"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    """Longest sequence, prompt and output together, in tokens."""
    rope_scaling: RopeScaling | None = None
    rope_factors: tuple[float, ...] | None = None
    """Per-pair divisors of the frequencies (GGUF's `rope_freqs.weight`), [head_dim / 2], or None."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Whether q, k and v projections (never o) add a bias."""
    qk_norm: bool = False
    """Whether each head of q and k is RMS-normalised before the rotation (Qwen 3)."""
    sliding_window: int | None = None
    """Every layer attends to this many last tokens, itself included; None: to all."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    torch_dtype: str = "float32"
    """The dtype the checkpoint was published in: "float32", "float16" or "bfloat16"."""

    def __post_init__(self) -> None:
        self._require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads")
        self._require(self.head_dim % 2 == 0, "head_dim must be even for rotary embeddings")
        self._require(self.parameter_count() <= MAX_PARAMETERS, f"more than {MAX_PARAMETERS} parameters")
        factors = self.rope_factors
        self._require(factors is None or len(factors) == self.head_dim // 2, "rope_freqs has a wrong length")
        self._require(factors is None or all(0 < f < 1e9 for f in factors), "rope_freqs must be positive")

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ModelFileError(
                f"The model's dimensions are not possible: {rule}.",
                hint="The configuration is corrupt, or describes another architecture.",
            )

    def parameter_count(self) -> int:
        """Number of weights, tied embeddings counted once; norms and biases are left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings

    def inv_freq(self) -> torch.Tensor:
        """Rotary angle per position, float32 [head_dim / 2], any context extension applied."""
        inv_freq = inverse_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
        return inv_freq if self.rope_factors is None else inv_freq / torch.tensor(self.rope_factors)

    @property
    def attention_scale(self) -> float:
        """Factor on q·k before the softmax.

        YaRN multiplies cos and sin by `attention_factor`; both q and k carry it, so
        its square belongs here and the rotation itself stays a rotation.
        """
        temperature = self.rope_scaling.attention_factor if self.rope_scaling else 1.0
        return self.head_dim**-0.5 * temperature**2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Build from a parsed config.json and generation_config.json (whose eos/bos ids win).

        Raises UnsupportedModelError naming a feature not implemented here, and
        ModelFileError for missing, mistyped or absurd values.
        """
        return cls(**config_hf.parse(config, generation or {}))

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tie_word_embeddings: bool = False,
        rope_factors: Sequence[float] | None = None,
    ) -> ModelConfig:
        """Build from GGUF metadata; the keyword arguments come from which tensors the file holds.

        Raises as `from_hf` does.
        """
        factors = None if rope_factors is None else tuple(float(f) for f in rope_factors)
        fields = config_gguf.parse(metadata)
        return cls(**fields, tie_word_embeddings=tie_word_embeddings, rope_factors=factors)
