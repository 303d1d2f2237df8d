"""Each policy's scores, against its formula worked out by hand."""

from __future__ import annotations

from itertools import pairwise
from math import isclose

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.clock import VirtualClock
from nanovllm.errors import ConfigError
from nanovllm.state.policies.gdsf import GDSF
from nanovllm.state.policies.lfu import LFU
from nanovllm.state.policies.lru import LRU
from nanovllm.state.policies.pgdsf import PGDSF
from nanovllm.state.policies.policy import NEVER
from nanovllm.state.policies.registry import POLICIES
from nanovllm.state.policies.ttl import TTL
from nanovllm.state.policies.value_density import ValueDensity
from tests.state.policy_objects import Thing, policy_of, seconds

A, B = Thing("a"), Thing("b")


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_never_used_or_is_forgotten_goes_first(name: str) -> None:
    policy = policy_of(name)
    assert policy.name == name and policy.score(A) == NEVER
    policy.on_access(A, 0, 10, False)
    before = policy.score(A)
    policy.on_access(B, 0, 10, False)
    assert policy.score(A) == before > NEVER  # only its own accesses change a score
    policy.forget(A)
    policy.on_evict([B])
    assert policy.score(A) == policy.score(B) == NEVER


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lru, lfu, gdsf, pgdsf, ttl, value_density"):
        policy_of("mru")


def test_lru_counts_accesses_lfu_those_of_one_stay() -> None:
    lru, lfu = LRU(), LFU()
    for policy in (lru, lfu):
        for thing in (A, A, B):
            policy.on_access(thing, 0, 10, False)
    assert lru.score(A) < lru.score(B) and lfu.score(A) > lfu.score(B)
    lfu.on_evict([A])
    lfu.on_access(A, 0, 10, False)
    assert lfu.score(A) == 1


def test_gdsf_by_hand() -> None:
    """clock + frequency * cost / size; the clock is the highest score evicted."""
    policy = GDSF()
    small, big = Thing("small", size_bytes=50, cost_ms=6.0), Thing("big", size_bytes=200, cost_ms=6.0)
    policy.on_access(big, 0, 10, False)
    policy.on_access(big, 0, 10, True)
    policy.on_access(small, 0, 10, False)
    assert policy.score(big) == pytest.approx(2 * 6 / 200) and policy.score(small) == pytest.approx(6 / 50)
    policy.on_evict([big])
    assert policy.clock == pytest.approx(0.06)
    policy.on_access(big, 0, 10, False)
    assert policy.score(big) == pytest.approx(0.06 + 6 / 200)  # a new stay: frequency 1


def test_pgdsf_by_hand() -> None:
    """Equations 1 and 2 with T(cached, new) = new + 0.01 * new * cached, so T/new = 1 + 0.01 * cached."""
    policy = PGDSF(lambda cached, new: new + 0.01 * new * cached)
    policy.on_access(A, 0, 40, False)  # T/new = 1
    assert policy.score(A) == pytest.approx(1 * 1.0)
    policy.on_access(A, 40, 5, True)  # a hit adds to the frequency, not to the average
    assert policy.score(A) == pytest.approx(2 * 1.0)
    policy.on_evict([A])
    policy.on_access(A, 100, 10, False)  # T/new = 2: the average of 1 and 2; frequency goes on at 3
    assert policy.score(A) == pytest.approx(2.0 + 3 * 1.5)
    twice_as_big = Thing("c", size_bytes=10**6, num_tokens=80)
    policy.on_access(twice_as_big, 100, 10, False)  # the size is in the average already
    assert policy.score(twice_as_big) == pytest.approx(2.0 + 2.0)


def test_pgdsf_takes_the_objects_own_cost_where_it_never_missed() -> None:
    policy = PGDSF(lambda cached, new: 0.0)
    policy.on_access(Thing("d", num_tokens=10, cost_ms=5.0), 10, 3, True)
    assert policy.score(Thing("d")) == pytest.approx(0.5)


def test_pgdsf_remembers_only_so_many_of_the_gone() -> None:
    policy = PGDSF(lambda cached, new: float(new), remembered=1)
    for thing in (A, B):
        policy.on_access(thing, 0, 10, False)
    policy.on_evict([A, B])
    start = policy.clock
    for thing in (A, B):
        policy.on_access(thing, 0, 10, False)
    assert policy.score(A) == pytest.approx(start + 1) and policy.score(B) == pytest.approx(start + 2)


ACCESSES = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 500), st.integers(1, 500), st.booleans(), st.booleans()),
    max_size=50,
)


@pytest.mark.parametrize("name", ["gdsf", "pgdsf"])
@settings(max_examples=50, deadline=None)
@given(ACCESSES)
def test_a_greedy_dual_clock_never_goes_back(name: str, accesses: list[tuple[str, int, int, bool, bool]]) -> None:
    policy = policy_of(name)
    assert isinstance(policy, GDSF | PGDSF)
    clock = 0.0
    for key, cached, new, hit, evict in accesses:
        thing = Thing(key, cost_ms=cached / 10, size_bytes=new)
        policy.on_access(thing, cached, new, hit)
        assert policy.score(thing) >= policy.clock  # no use is worth less than what was just let go
        if evict:
            score = policy.score(thing)
            policy.on_evict([thing])
            assert policy.clock == max(clock, score)
        assert policy.clock >= clock
        clock = policy.clock


def test_ttl_expires_at_its_nanosecond_and_a_use_renews_it() -> None:
    clock = VirtualClock()
    policy = TTL(clock, ttl_s=60)
    policy.on_access(A, 0, 10, False)
    clock.advance(seconds(30))
    policy.on_access(B, 0, 10, False)
    clock.advance(seconds(30) - 1)
    assert not policy.is_expired(A)
    clock.advance(1)
    assert policy.is_expired(A) and not policy.is_expired(B) and policy.score(A) < policy.score(B)
    policy.on_access(A, 10, 1, True)
    assert not policy.is_expired(A) and policy.score(A) > policy.score(B)


def test_value_density_by_hand() -> None:
    """Two uses a half-life apart are worth 1.5 fresh ones; a hit saves its cost less the load."""
    clock = VirtualClock()
    policy = ValueDensity(clock, half_life_s=10, load_of=lambda obj: 1.0)
    policy.on_access(A, 0, 10, False)
    clock.advance(seconds(10))
    policy.on_access(A, 10, 1, True)
    dear = Thing("dear", cost_ms=7.0)  # (7 - 1) / 100 per use: 1.5 times A's (5 - 1) / 100
    policy.on_access(dear, 0, 10, False)
    assert isclose(policy.score(A), policy.score(dear))
    policy.on_access(Thing("cheap", cost_ms=0.5), 0, 10, False)
    assert policy.score(Thing("cheap")) == NEVER  # loading costs more than computing


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), min_size=1, max_size=25), st.integers(0, 500))
def test_value_density_orders_as_the_faded_sum_at_any_later_time(uses: list[tuple[str, int]], later: int) -> None:
    clock = VirtualClock()
    policy = ValueDensity(clock, half_life_s=10)
    things = {key: Thing(key, cost_ms=cost) for key, cost in (("a", 1.0), ("b", 3.0), ("c", 7.7))}
    times: dict[str, list[int]] = {}
    now = 0
    for key, wait in uses:
        clock.advance(seconds(wait))
        now += wait
        times.setdefault(key, []).append(now)
        policy.on_access(things[key], 0, 10, False)
    values = {
        key: sum(2 ** (-(now + later - at) / 10) for at in found) * things[key].cost_ms / 100
        for key, found in times.items()
    }
    by_score = sorted(values, key=lambda key: policy.score(things[key]))
    for low, high in pairwise(by_score):
        assert values[low] <= values[high] * (1 + 1e-9)
