"""Choosing tokens: filters against plain definitions, noise that depends on (seed, position) alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.sampler import TOP_CANDIDATES, Sampler, _adjust, uniforms
from nanovllm.engine.sampling_batch import SamplingBatch
from nanovllm.engine.sequence import Sequence

VOCAB = 12
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -3.5])


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    seed = params.pop("seed", 0)
    seq = Sequence(prompt or [1], SamplingParams(**params), block_size=4, seed=seed)
    for token_id in output or []:
        seq.append_token(token_id)
    return seq


def sample(logits: torch.Tensor, *seqs: Sequence) -> list[int]:
    rows = logits if logits.dim() == 2 else logits.expand(len(seqs), -1)
    return Sampler().sample(rows.clone(), SamplingBatch.build(list(seqs))).token_ids.tolist()


def support(logits: torch.Tensor, **params: Any) -> set[int]:
    """Every token that 400 seeds choose."""
    return set(sample(logits, *(sequence(seed=seed, **params) for seed in range(400))))


def test_temperature_zero_is_argmax_and_needs_no_noise() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    seqs = [sequence(temperature=0.0, seed=seed) for seed in range(5)]
    assert sample(logits, *seqs) == logits.argmax(dim=-1).tolist()


def test_frequencies_follow_the_softmax() -> None:
    count = 4000
    drawn = Counter(sample(LOGITS, *(sequence(seed=seed, temperature=0.7) for seed in range(count))))
    for token_id, probability in enumerate(torch.softmax(LOGITS / 0.7, dim=-1).tolist()):
        deviation = 5 * math.sqrt(probability * (1 - probability) / count)
        assert abs(drawn[token_id] / count - probability) <= deviation + 1 / count


def test_uniforms_are_uniform_and_do_not_repeat() -> None:
    seeds, positions = np.repeat(np.arange(100, dtype=np.uint64), 100), np.tile(np.arange(100), 100)
    drawn = uniforms(seeds, positions)
    assert len(set(drawn.tolist())) == len(drawn) and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 30  # chi-square, 9 degrees of freedom, p about 0.0004
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 30), st.floats(0.1, 3)), min_size=1, max_size=6))
def test_a_row_does_not_depend_on_its_batch(rows: list[tuple[int, int, float]]) -> None:
    seqs = [sequence(output=[3] * length, seed=seed, temperature=t, top_p=0.9, top_k=7) for seed, length, t in rows]
    logits = torch.randn(len(seqs), 300, generator=torch.Generator().manual_seed(1))
    together = sample(logits, *seqs)
    assert together == [sample(logits[i : i + 1], seq)[0] for i, seq in enumerate(seqs)]


def test_neighbouring_seeds_and_positions_differ() -> None:
    flat = torch.zeros(10_000)
    assert len(set(sample(flat, *(sequence(seed=seed) for seed in range(50))))) > 45
    assert len(set(sample(flat, *(sequence(seed=1, output=[2] * i) for i in range(50))))) > 45


@pytest.mark.parametrize("top_k", [1, 2, 5, VOCAB, VOCAB + 100])
def test_top_k_keeps_the_k_most_likely(top_k: int) -> None:
    assert support(LOGITS, top_k=top_k, temperature=5.0) == set(range(min(top_k, VOCAB)))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.999))
def test_top_p_keeps_the_boundary_token(top_p: float) -> None:
    """The smallest set whose probability reaches p, by the plain definition."""
    probs = torch.softmax(LOGITS / 3.0, dim=-1).tolist()
    kept, reached = set(), 0.0
    for token_id in sorted(range(VOCAB), key=lambda t: -probs[t]):
        if reached >= top_p - 1e-6:
            break
        kept.add(token_id)
        reached += probs[token_id]
    drawn = support(LOGITS, top_p=top_p, temperature=3.0)
    boundary = min(kept, key=lambda t: probs[t])
    assert drawn <= kept
    assert boundary in drawn or probs[boundary] < 0.02  # 400 draws miss only what is rare


def test_top_p_looks_beyond_its_first_candidates_when_it_must() -> None:
    flat = torch.zeros(4 * TOP_CANDIDATES)
    drawn = sample(flat, *(sequence(seed=seed, top_p=0.95) for seed in range(300)))
    assert max(drawn) >= TOP_CANDIDATES, "a flat distribution reaches 0.95 only beyond the first candidates"


def test_filters_of_one_row_leave_the_others_alone() -> None:
    strict = [sequence(seed=s, temperature=3.0, top_k=1, min_p=0.9, top_p=0.01) for s in range(200)]
    free = [sequence(seed=s, temperature=3.0) for s in range(200)]
    drawn = sample(LOGITS, *(seq for pair in zip(strict, free, strict=True) for seq in pair))
    assert set(drawn[::2]) == {0} and drawn[1::2] == sample(LOGITS, *free)


def test_min_p_is_relative_to_the_most_likely() -> None:
    probs = torch.softmax(LOGITS / 2.0, dim=-1)
    expected = {t for t in range(VOCAB) if probs[t] >= 0.3 * probs[0]}
    assert support(LOGITS, min_p=0.3, temperature=2.0) == expected


def test_logit_bias_forces_and_forbids() -> None:
    assert sample(LOGITS, sequence(temperature=0.0, logit_bias={7: 100.0})) == [7]
    assert 0 not in support(LOGITS, logit_bias={0: -100.0})


def test_nothing_ends_before_min_tokens() -> None:
    early = sequence(temperature=0.0, min_tokens=2, stop_token_ids=[0], output=[5])
    late = sequence(temperature=0.0, min_tokens=2, stop_token_ids=[0], output=[5, 5])
    early.eos_token_ids = late.eos_token_ids = (1,)
    assert sample(LOGITS, early, late) == [2, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.floats(0.5, 2.0),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_follow_their_definitions(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    expected = LOGITS.tolist()
    for token_id in set(prompt + output):
        value = expected[token_id]
        expected[token_id] = value / repetition if value > 0 else value * repetition
    for token_id, count in Counter(output).items():
        expected[token_id] -= presence + frequency * count
    penalties = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    chosen = sample(LOGITS, sequence(prompt, output, temperature=0.0, **penalties))[0]
    assert expected[chosen] == pytest.approx(max(expected), abs=1e-4)


def changed(logits: torch.Tensor, seq: Sequence) -> torch.Tensor:
    """One row's logits by the definitions, one token at a time: bans, bias, penalties."""
    row, params = logits.clone(), seq.sampling_params
    if seq.num_completion_tokens < params.min_tokens:
        for token_id in (*seq.eos_token_ids, *params.stop_token_ids):
            row[token_id] = -math.inf
    for token_id, bias in params.logit_bias.items():
        row[token_id] += bias
    if not params.has_penalties:
        return row
    for token_id, _ in Counter(seq.token_ids).items():
        factor = torch.tensor(params.repetition_penalty)
        row[token_id] = row[token_id] / factor if row[token_id] > 0 else row[token_id] * factor
    for token_id, count in Counter(seq.token_ids[seq.num_prompt_tokens :]).items():
        scaled = torch.tensor(params.frequency_penalty) * count
        row[token_id] -= torch.tensor(params.presence_penalty) + scaled
    return row


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "prompt": st.lists(st.integers(0, 39), min_size=1, max_size=8),
                "output": st.lists(st.integers(0, 39), max_size=8),
                "repetition_penalty": st.sampled_from([1.0, 1.3]),
                "presence_penalty": st.sampled_from([0.0, 0.7]),
                "frequency_penalty": st.sampled_from([0.0, -0.4]),
                "logit_bias": st.dictionaries(st.integers(0, 39), st.sampled_from([-3.0, 2.5]), max_size=3),
                "min_tokens": st.integers(0, 6),
                "stop_token_ids": st.lists(st.integers(0, 39), max_size=2).map(tuple),
            }
        ),
        min_size=1,
        max_size=7,
    ),
    seed=st.integers(0, 2**31),
)
def test_a_batch_of_changes_is_each_rows_own_to_the_bit(rows: list[dict[str, Any]], seed: int) -> None:
    seqs = [sequence(max_tokens=16, **row) for row in rows]
    logits = torch.randn(len(seqs), 40, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([changed(row, seq) for row, seq in zip(logits, seqs, strict=True)])
    assert torch.equal(_adjust(logits.clone(), SamplingBatch.build(seqs)), expected)


def test_logprobs_are_those_of_the_models_own_logits() -> None:
    seqs = [sequence(temperature=0.0, logprobs=3, logit_bias={7: 100.0}), sequence(temperature=0.0)]
    result = Sampler().sample(LOGITS.expand(2, -1).clone(), SamplingBatch.build(seqs))
    expected = torch.log_softmax(LOGITS, dim=-1)
    assert result.logprobs[1] is None and result.logprobs[0] is not None
    assert [token_id for token_id, _ in result.logprobs[0]] == [7, 0, 1, 2]
    for token_id, logprob in result.logprobs[0]:
        assert logprob == pytest.approx(float(expected[token_id]), abs=1e-5)


def test_logprobs_of_a_row_are_those_it_has_alone() -> None:
    """Equal logits, as bfloat16 has many: which of them come first depends on the row and its count only."""
    logits = (torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 2).round()
    seqs = [sequence(temperature=0.0, logprobs=count) for count in (5, None, 2, 5, 0, 20)]
    together = Sampler().sample(logits.clone(), SamplingBatch.build(seqs)).logprobs
    assert [row if row is None else len(row) for row in together] == [6, None, 3, 6, 1, 21]
    for row, seq, found in zip(logits, seqs, together, strict=True):
        assert Sampler().sample(row[None].clone(), SamplingBatch.build([seq])).logprobs == [found]


def test_logits_are_left_as_they_were() -> None:
    logits = LOGITS[None].clone()
    Sampler().sample(logits, SamplingBatch.build([sequence(logit_bias={3: 5.0}, repetition_penalty=1.3)]))
    assert torch.equal(logits[0], LOGITS)


def test_a_draw_stays_in_the_vocabulary_where_logits_overflow() -> None:
    """Regression: huge logits over a small temperature were infinite, and the draw fell behind the last token."""
    logits = torch.tensor([[3e37, 1.0, 2.0]])
    assert sample(logits, sequence(temperature=0.05)) == [0]
