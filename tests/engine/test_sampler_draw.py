"""The draw is the inverse of the cumulative distribution, found in two looks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.sampler import SPAN, _invert


@settings(max_examples=100, deadline=None)
@given(
    vocab=st.integers(1, 5 * SPAN + 3),
    kept=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    noise=st.sampled_from([0.0, 0.5, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True),
)
def test_it_is_where_the_distribution_passes_the_noise(vocab: int, kept: int, seed: int, noise: float) -> None:
    """To the rounding of float32 sums; never a token without probability, at either end of the noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((1, vocab), float("-inf"))
    places = torch.randperm(vocab, generator=generator)[:kept]
    logits[0, places] = torch.randn(len(places), generator=generator) * 4
    probs = logits.softmax(-1)
    token = int(_invert(probs, torch.tensor([noise], dtype=torch.float64)))
    cumulative = probs[0].double().cumsum(0)
    target = noise * float(cumulative[-1])
    assert 0 <= token < vocab and probs[0, token] > 0
    assert float(cumulative[token]) >= target - 1e-6
    assert float(cumulative[token] - probs[0, token]) <= target + 1e-6


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    probs, noise = torch.randn(9, 1000).softmax(-1), torch.rand(9, dtype=torch.float64)
    together = _invert(probs, noise)
    assert [int(_invert(probs[i : i + 1], noise[i : i + 1])) for i in range(9)] == together.tolist()
