"""The cost table: what was observed is measured, everything else is an estimate and says so."""

from __future__ import annotations

import pytest

from nanovllm.core.cost_table import CostTable


def test_an_observed_point_is_measured_and_means_are_kept() -> None:
    table = CostTable()
    table.observe(0, 128, 10.0)
    table.observe(0, 128, 14.0)
    assert (table.estimate(0, 128).ms, table.estimate(0, 128).label) == (pytest.approx(12.0), "measured")


def test_everything_else_is_estimated_from_the_model() -> None:
    table = CostTable(base_ms=1.0, per_new_ms=0.1, per_pair_ms=0.001)
    table.observe(0, 128, 10.0)
    estimate = table.estimate(100, 10)
    assert estimate.label == "estimated"
    assert estimate.ms == pytest.approx(1.0 + 0.1 * 10 + 0.001 * 10 * (100 + 5))


def test_a_batch_costs_the_sum_of_its_rows() -> None:
    table = CostTable(per_new_ms=0.1, per_pair_ms=0.001)
    rows = [(0, 16), (300, 1), (40, 7)]
    assert table.step_ms(rows) == pytest.approx(sum(table.estimate(*row).ms for row in rows))
