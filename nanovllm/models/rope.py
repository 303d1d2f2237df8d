"""Rotary-embedding frequencies and their context-extension schemes.

What it is: the closed set of RoPE scalings this package implements, as a frozen
value and pure functions of it. What it knows nothing about: files, layers, devices.
Invariant: a `RopeScaling` that exists is one that `inverse_frequencies` can honour.
Sources: Chen et al. 2023 (linear), Llama 3.1 model card (llama3), Peng et al. 2023
(YaRN); the arithmetic follows transformers' `modeling_rope_utils` to the last operation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SCALING_KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """One context-extension scheme; fields that the kind does not use keep their defaults."""

    kind: str
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplier of cos and sin (YaRN's temperature); the attention scores see its square."""


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Angular step per position of each rotated pair: float32 [head_dim / 2], radians per token."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    inv_freq = 1.0 / (theta**exponents)
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling)
    return _yarn(inv_freq, head_dim, theta, scaling)


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > context / low, inv_freq / scaling.factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    between = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(between, blended, stretched)


def _yarn(inv_freq: torch.Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Dimensions that turn often keep their frequency, slow ones are stretched, a ramp joins them."""
    low = _dimension_turning(scaling.beta_fast, head_dim, theta, scaling.original_max_position)
    high = _dimension_turning(scaling.beta_slow, head_dim, theta, scaling.original_max_position)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # equal bounds would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)


def _dimension_turning(rotations: float, head_dim: int, theta: float, context: int) -> float:
    """The (fractional) dimension whose pair turns `rotations` times within `context` tokens."""
    return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN's default multiplier of cos and sin when a file names none."""
    if mscale and mscale_all_dim:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
