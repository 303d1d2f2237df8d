"""choice.c chooses what the sampler's torch operations choose: the same filters, the same place in the distribution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.sampler import _choose, _filter, uniforms
from nanovllm.engine.sampling_batch import SamplingBatch
from nanovllm.kernels.c_library import load
from nanovllm.kernels.compiled_choice import CompiledChoice
from nanovllm.kernels.team import Team

CHOICE = CompiledChoice(Team(load(torch.float32), 2))
NEAR = 1e-5  # of the whole distribution: what sums of float32 in another order may shift


def chosen(logits: torch.Tensor, noise: Any = 0.5, **columns: Any) -> list[int]:
    """The tokens of `logits` [M, vocab]; columns as numbers for all rows, or arrays."""
    rows = len(logits)
    full = {"temperature": 1.0, "min_p": 0.0, "top_p": 1.0} | columns
    floats = {name: np.full(rows, full[name], np.float32) for name in ("temperature", "min_p", "top_p")}
    top_k = np.full(rows, full.get("top_k", 0), np.int64)
    found = CHOICE(logits.clone(), **floats, top_k=top_k, noise=np.full(rows, noise, np.float64))
    return [int(token) for token in found]


@settings(max_examples=200, deadline=None)
@given(
    vocab=st.integers(1, 700),
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.3, 1e-6]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 2000]),
    forbidden=st.booleans(),
    noise=st.sampled_from([0.0, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_where_the_filtered_distribution_passes_the_noise(
    vocab: int, seed: int, temperature: float, min_p: float, top_p: float, top_k: int, forbidden: bool, noise: float
) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    if forbidden:
        logits[0, 1::2] = float("-inf")
    columns = {"temperature": temperature, "min_p": min_p, "top_p": top_p, "top_k": top_k}
    token = chosen(logits, noise, **columns)[0]
    batch: Any = SimpleNamespace(**{name: np.array([value]) for name, value in columns.items()})
    kept = _filter((logits / temperature).double(), batch, np.array([0])).softmax(-1)[0]
    cumulative = kept.cumsum(0)
    assert 0 <= token < vocab and kept[token] > 0
    assert float(cumulative[token]) >= noise - NEAR and float(cumulative[token] - kept[token]) <= noise + NEAR


def test_the_likeliest_is_the_first_of_the_largest_and_no_number_is_no_token() -> None:
    logits = torch.randn(6, 1003, generator=torch.Generator().manual_seed(3))
    logits[1, 7] = logits[1, 1002] = 50.0
    logits[2, 1002] = 50.0
    logits[3, 5] = float("nan")
    logits[4, 5] = float("inf")
    logits[5] = float("-inf")
    greedy = chosen(logits, temperature=0.0)
    assert greedy == [int(logits[0].argmax()), 7, 1002, -1, -1, -1]
    assert chosen(logits)[3:] == [-1, -1, -1]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_row_does_not_depend_on_neighbours_or_threads(threads: int) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, noise = torch.randn(9, 49152, generator=generator) * 3, np.random.default_rng(5).random(9)
    columns: dict[str, Any] = {"top_p": 0.95, "top_k": np.arange(9) * 10, "temperature": np.linspace(0, 2, 9)}
    alone = [
        chosen(logits[i : i + 1], noise[i], **{name: np.broadcast_to(c, 9)[i] for name, c in columns.items()})[0]
        for i in range(9)
    ]
    other = CompiledChoice(Team(load(torch.float32), threads))
    floats = {name: np.full(9, columns.get(name, 0.0), np.float32) for name in ("temperature", "min_p", "top_p")}
    assert other(logits.clone(), **floats, top_k=columns["top_k"], noise=noise).tolist() == alone


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1])).expand(4000, -1)
    tokens = chosen(logits, (np.arange(4000) + 0.5) / 4000)
    assert np.bincount(tokens, minlength=4).tolist() == [2000, 1000, 600, 400]


def test_the_sampler_chooses_the_same_tokens_either_way() -> None:
    """On logits as models have them, 2,560 draws: none lies where rounding decides."""
    generator, numbers = torch.Generator().manual_seed(6), np.random.default_rng(7)
    logits = torch.randn(64, 5000, generator=generator) * 3
    plain: Any = SimpleNamespace(
        temperature=numbers.choice([0.0, 0.6, 1.0], 64).astype(np.float32),
        min_p=numbers.choice([0.0, 0.02], 64).astype(np.float32),
        top_p=numbers.choice([1.0, 0.9], 64).astype(np.float32),
        top_k=numbers.choice([0, 50], 64),
        seeds=np.arange(64, dtype=np.uint64),
        all_greedy=False,
    )
    for position in range(40):
        plain.positions = np.full(64, position)
        noise, batch = uniforms(plain.seeds, plain.positions), cast(SamplingBatch, plain)
        found = CHOICE(logits.clone(), plain.temperature, plain.min_p, plain.top_p, plain.top_k, noise)
        assert found.tolist() == _choose(logits.clone(), batch).tolist()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"min_p": 1.0}, {"temperature": 0.0}])
def test_the_likeliest_alone_is_what_is_asked_for_however_near_the_next(filters: dict[str, Any]) -> None:
    """Regression: filters looked at weights, which are equal where logits hardly differ."""
    near = float(np.nextafter(np.float32(0.5), np.float32(1)))
    logits = torch.tensor([[0.5, near, -3.0]]).expand(9, -1)
    assert set(chosen(logits, np.linspace(0, 0.999, 9), **({"temperature": 2.0} | filters))) == {1}
