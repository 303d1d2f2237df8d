"""Pace: the run's best decode steps, and one that was slow among its like."""

from __future__ import annotations

from nanovllm.core.events import StepEvent
from nanovllm.observe.pace import Pace
from nanovllm.observe.paths import Step


def steps(*lengths: tuple[int, int, int]) -> list[Step]:
    """(nanoseconds, prompt tokens, decodes) each."""
    found, at_ns = [], 0
    for number, (length, prefill, decodes) in enumerate(lengths):
        event = StepEvent(number, at_ns, number, decodes, decodes, 0, prefill, decodes, 9)
        found.append(Step(event, at_ns + length))
        at_ns += length
    return found


def test_the_best_pace_is_that_of_pure_decode_steps() -> None:
    assert Pace(steps((5, 9, 0), *[(100, 0, 1)] * 5, (20, 0, 1), (1, 3, 1))).best_ns == 20
    assert Pace(steps((5, 9, 0))).best_ns is None and Pace([]).best_ns is None


def test_a_step_is_compared_with_those_around_it_that_decode_as_many() -> None:
    run = steps(*[(100, 0, 1)] * 4, (900, 0, 1), *[(200, 0, 2)] * 5, (7, 9, 2))
    pace = Pace(run)
    assert [pace.usual_ns(step) for step in run] == [100] * 5 + [200] * 5 + [None]


def test_a_slow_trend_is_no_unevenness() -> None:
    """Contexts grow: each step is longer than the one before, and none is slow among its like."""
    run = steps(*[(100 + i, 0, 1) for i in range(100)])
    pace = Pace(run)
    assert all(abs((pace.usual_ns(step) or 0) - (100 + i)) <= 4 for i, step in enumerate(run))


def test_of_few_steps_nothing_is_told() -> None:
    run = steps(*[(100, 0, 1)] * 4)
    assert [Pace(run).usual_ns(step) for step in run] == [None] * 4
