"""Statistics: each formula by its definition, and the state counter against the blocks it counts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.state_count import count_totals
from nanovllm.observe.statistics import (
    HeldState,
    StateCount,
    integral,
    jitter_ns,
    levels,
    meets,
    per_second,
    percentile,
    spread,
    state_size,
    tail_ratio,
    time_mean,
    tpot_ns,
)
from tests.engine.helpers import greedy, make_bench

gaps = st.lists(st.integers(0, 10**9), max_size=30)
changes = st.lists(st.tuples(st.integers(0, 1000), st.sampled_from([1, -1])), max_size=30)


@given(gaps)
def test_tpot_and_jitter_by_definition(found: list[int]) -> None:
    assert tpot_ns(found) == (sum(found) / len(found) if found else None)
    moves = [abs(b - a) for a, b in pairwise(found)]
    assert jitter_ns(found) == (sum(moves) / len(moves) if moves else None)


def test_a_steady_stream_has_no_jitter_and_an_uneven_one_of_equal_speed_has() -> None:
    assert jitter_ns([10, 10, 10]) == 0 and jitter_ns([0, 20, 0, 20]) == 20
    assert tpot_ns([10, 10]) == tpot_ns([0, 20])


@pytest.mark.parametrize(
    ("figure", "wanted"),
    [
        (per_second(120, 20 * 10**9), 6),  # tutorial 1: throughput
        (per_second(84, 20 * 10**9), 4.2),  # and goodput
        (per_second(1, 0), None),
        (tail_ratio([1, 1, 1, 3]), 3),
        (tail_ratio([]), None),
        (tail_ratio([0, 5, 0]), None),
        (spread([98, 100, 101, 99, 102]), 0.04),  # tutorial 10
        (spread([5]), None),
    ],
)
def test_rates_and_stability(figure: float | None, wanted: float | None) -> None:
    assert figure == wanted


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_the_tail_is_never_below_the_middle(values: list[int]) -> None:
    assert (tail_ratio(values) or 0) >= 1 and percentile(sorted(values), 99) in values


@given(changes)
def test_an_integral_is_the_sum_of_what_each_moment_holds(found: list[tuple[int, int]]) -> None:
    by_hand = sum(change for at, change in found for moment in range(100, 900) if at <= moment)
    assert integral(levels(found), 100, 900) == by_hand
    assert time_mean(levels(found), 100, 900) == by_hand / 800 and time_mean(levels(found), 5, 5) is None


def test_an_objective_on_what_a_request_has_not_is_missed() -> None:
    assert meets({"ttft": 5e6, "tpot": 1e6}, {"ttft": 5, "tpot": 1}) and not meets({"ttft": 5e6 + 1}, {"ttft": 5})
    assert not meets({"ttft": None}, {"ttft": 5}) and meets({}, {})


@given(st.integers(1, 64), st.integers(0, 500), st.integers(1, 64))
def test_the_bound_is_what_rounding_to_blocks_adds(block_size: int, tokens: int, token_bytes: int) -> None:
    size = state_size(HeldState("r", -(-tokens // block_size), tokens, False), block_size, block_size * token_bytes)
    assert size.token_exact == tokens * token_bytes
    assert size.block_exact - size.approximation_bound == size.token_exact
    assert 0 <= size.approximation_bound < block_size * token_bytes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=6), st.integers(0, 25))
def test_the_counter_counts_the_blocks_that_are_there(work: list[tuple[int, int]], num_steps: int) -> None:
    bench = make_bench(num_blocks=12, max_prefill_chunk=5)
    for length, tokens in work:
        bench.engine.add_request([1] * length, greedy(tokens))
    for _ in range(num_steps):
        bench.step()
    count, manager = bench.scheduler.count_state(), bench.manager
    holders = [seq for seq in bench.scheduler.live() if seq.block_table]
    assert count.live_requests == len(holders) and count.num_waiting == len(bench.scheduler.waiting)
    assert count.prefilling_requests == sum(seq.is_prefilling for seq in holders)
    assert count.used_blocks == len(manager.used_block_ids)
    assert count.free_blocks + count.used_blocks == manager.num_blocks and count.cached_blocks <= count.free_blocks
    distinct = len({block_id for seq in holders for block_id in seq.block_table})
    entries = sum(len(seq.block_table) for seq in holders)
    assert count.sharing_factor == (entries / distinct if distinct else None)
    assert count_totals(holders) == (count.live_requests, count.prefilling_requests, entries)


def test_shared_blocks_show_as_a_sharing_factor() -> None:
    bench = make_bench()
    for i in range(3):
        bench.engine.add_request([*range(12), i], greedy(9))
    bench.step()
    bench.step()
    assert bench.scheduler.count_state().sharing_factor == pytest.approx(12 / 6)


def test_bytes_by_kind_make_up_the_pool() -> None:
    count = StateCount((HeldState("a", 3, 9, False),), 10, 7, 2, block_size=4, block_bytes=100)
    assert count.bytes_by_kind == {"kv_held": 300, "kv_cached": 200, "free": 500}
    (size,) = count.sizes()
    assert (size.block_exact, size.token_exact, size.approximation_bound) == (300, 225, 75)


def test_a_policy_reads_the_counter() -> None:
    """One that admits below two live requests: the others wait, all of them finish, and the reason is told."""
    seen: list[int] = []

    def below_two(seq: Sequence, count: StateCount) -> bool:
        seen.append(count.live_requests)
        return count.live_requests < 2

    bench = make_bench(may_admit=below_two, simulated=True)
    for i in range(5):
        bench.engine.add_request([i] * 6, greedy(4))
    bench.step()
    assert bench.scheduler.count_state().live_requests == 2 and bench.scheduler.count_state().num_waiting == 3
    assert len(bench.drain()) == 5 and max(seen) == 2
    reasons = {event.reason for event in bench.engine.events.reader(from_start=True).poll() if hasattr(event, "reason")}
    assert reasons == {"policy"}


def test_a_policy_that_admits_nobody_stops_nothing() -> None:
    bench = make_bench(may_admit=lambda seq, count: False)
    for i in range(3):
        bench.engine.add_request([i] * 6, greedy(4))
    assert len(bench.drain()) == 3
