"""The prefill rate: little prompts beside many decodes, and a slow past, do not make a fast engine look slow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.prefill_rate import ENOUGH_TOKENS, PrefillRate


def test_nothing_is_said_before_enough_was_seen() -> None:
    rate = PrefillRate()
    rate.note(int(ENOUGH_TOKENS) - 1, 0, 1.0)
    assert rate.tokens_per_s == 0
    rate.note(63, 0, 1.0)
    assert rate.tokens_per_s == pytest.approx(63, rel=0.01)


def test_a_tiny_prompt_beside_many_decodes_says_next_to_nothing() -> None:
    rate = PrefillRate()
    rate.note(2000, 0, 1.0)
    for _ in range(20):
        rate.note(1, 64, 0.2)
    assert rate.tokens_per_s > 1800


def test_a_slow_past_is_forgotten_by_tokens() -> None:
    """A machine that was starved, then is not: some thousands of tokens later the rate is the new one."""
    rate = PrefillRate()
    for _ in range(50):
        rate.note(20, 0, 2.0)
    assert rate.tokens_per_s == pytest.approx(10)
    for _ in range(40):
        rate.note(512, 0, 0.25)
    assert rate.tokens_per_s > 1500


@given(st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 64), st.floats(1e-4, 10.0)), max_size=40))
def test_it_lies_between_the_slowest_and_the_fastest_step(steps: list[tuple[int, int, float]]) -> None:
    rate = PrefillRate()
    for step in steps:
        rate.note(*step)
    speeds = [(prefill + decode) / seconds for prefill, decode, seconds in steps if prefill]
    if rate.tokens_per_s:
        assert min(speeds) * 0.999 <= rate.tokens_per_s <= max(speeds) * 1.001
