"""What steps cost, learnt from those that ran: a line, never negative, over a restart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.core.cost_table import CostTable
from nanovllm.engine.step_costs import StepCosts


def test_attention_is_told_apart_where_the_steps_show_it() -> None:
    costs, truth = StepCosts(), CostTable(3.0, 0.05, 2e-5)
    for cached, new in [(0, 512), (512, 512), (1024, 512), (1536, 512), (0, 64), (2000, 100)]:
        costs.observe(new, truth.estimate(cached, new).ms, new * (cached + new / 2))
    assert costs.ms(4096, 512) == pytest.approx(truth.estimate(4096, 512).ms, rel=1e-6)
    again = StepCosts()
    again.recall(json.loads(json.dumps(costs.record())))
    assert again.ms(4096, 512) == pytest.approx(costs.ms(4096, 512))


@given(st.lists(st.tuples(st.integers(16, 2048), st.integers(0, 8192), st.floats(0.01, 1e4)), min_size=1, max_size=20))
def test_no_steps_make_a_negative_cost(steps: list[tuple[int, int, float]]) -> None:
    costs = StepCosts()
    for new, cached, ms in steps:
        costs.observe(new, ms, new * (cached + new / 2))
    table = costs.table()
    assert min(table.base_ms, table.per_new_ms, table.per_pair_ms) >= 0 and 0 < costs.ms(100, 100) < 1e9


@pytest.mark.parametrize("record", [{}, {"products": [[1]], "moments": [1, 2, 3]}, {"products": 3, "moments": None}])
def test_a_record_that_is_none_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        StepCosts().recall(record)


def test_costs_are_a_line_through_recent_steps() -> None:
    costs = StepCosts()
    assert not costs.is_known and costs.ms(0, 100) == 0
    costs.observe(3, 9.0)
    assert not costs.is_known
    for new in (32, 64, 128, 256):
        costs.observe(new, 5 + 0.5 * new)
    assert costs.ms(0, 1000) == pytest.approx(505) and costs.table().estimate(0, 10).label == "estimated"
