"""The small sums behind the metrics, against plain arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as TheirHistogram

from nanovllm.observe.instruments import MANY, Histogram, Monotone

BOUNDS = (0.01, 0.025, 0.3, 1.0)
NS = 10**9
values = st.lists(
    st.one_of(st.integers(0, 2 * NS), st.sampled_from([round(b * NS) + d for b in BOUNDS for d in (-1, 0, 1)])),
    max_size=3 * MANY,
)


def exported(histogram: Histogram) -> dict[tuple[str, str], float]:
    family = histogram.family("h", "a histogram", {"model_name": "m"})
    return {(sample.name, sample.labels.get("le", "")): sample.value for sample in family.samples}


@given(values)
def test_a_histogram_counts_as_prometheus_clients_does(observed: list[int]) -> None:
    theirs = TheirHistogram("h", "a histogram", buckets=BOUNDS, registry=CollectorRegistry())
    for value in observed:
        theirs.observe(value / NS)
    expected = {
        (s.name, s.labels.get("le", "")): s.value for s in theirs.collect()[0].samples if not s.name.endswith("created")
    }
    at_once, one_by_one = Histogram(BOUNDS, NS), Histogram(BOUNDS, NS)
    at_once.observe_all(observed)
    for value in observed:
        one_by_one.observe(value)
    assert exported(at_once) == exported(one_by_one)
    total = ("h_sum", "")
    assert {**exported(at_once), total: 0} == {**expected, total: 0}
    assert exported(at_once)[total] == sum(observed) / NS  # theirs adds floats: close, and not equal
    assert at_once.count == len(observed)


def test_the_same_value_several_times() -> None:
    once, thrice = Histogram((1, 5)), Histogram((1, 5))
    once.observe(4, 3)
    for _ in range(3):
        thrice.observe(4)
    assert exported(once) == exported(thrice) and once.sum == 12


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), max_size=5))
def test_a_total_outlives_restarts(lives: list[list[int]]) -> None:
    """Each life counts up from 0; the total is the sum of what the lives reached, as far as a restart shows."""
    source, expected = Monotone(), 0
    for steps in lives:
        source.read(0)  # what a new engine says first
        reached = 0
        for step in steps:
            reached += step
            before = source.total
            source.read(reached)
            assert source.total == before + step
        expected += reached
    assert source.total == expected


def test_a_restart_that_nobody_saw_at_0_still_counts() -> None:
    source = Monotone()
    source.read(100)
    source.read(7)
    assert source.total == 107
