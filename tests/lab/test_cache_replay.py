"""The cache simulator: the known bounds of the public traces, and small traces against exhaustive search."""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from itertools import chain, combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.cost_table import CostTable
from nanovllm.errors import ConfigError, InvalidRequestError
from nanovllm.lab.cache_replay import KIND, Replay, ReplaySetting, replay
from nanovllm.lab.cache_trace import Block, CacheTrace, make_cache_trace
from nanovllm.lab.clairvoyant import Clairvoyant
from nanovllm.observe.prefix_trace import TraceRow, read_prefix_trace
from nanovllm.state.policies.registry import POLICIES

TRACES = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "traces"
COSTS = CostTable(base_ms=10, per_new_ms=0.3, per_pair_ms=0.0001)
SETTING = ReplaySetting(COSTS, ttl_s=8, half_life_s=10)
NAMES = (*POLICIES, Clairvoyant.name)


@cache
def mooncake(name: str, limit: int | None = None) -> CacheTrace:
    rows = read_prefix_trace(TRACES / f"mooncake_{name}_trace.jsonl.gz")
    return make_cache_trace(rows, 512, COSTS, scale=32, bytes_per_token=23_040, limit=limit)


def small(prompts: list[str], step_ms: int = 1000) -> CacheTrace:
    """A prompt is a path of letters, a block of 4 tokens each."""
    rows = [TraceRow(step_ms * i, 4 * len(path), tuple(map(ord, path))) for i, path in enumerate(prompts)]
    return make_cache_trace(rows, 4, COSTS)


@pytest.mark.parametrize("line", (TRACES / "SHA256SUMS").read_text().splitlines())
def test_the_traces_are_the_published_ones(line: str) -> None:
    digest, name = line.split()
    path = TRACES / name
    content = path.read_bytes() if path.exists() else gzip.decompress((TRACES / f"{name}.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "blocks", "distinct", "percent"),
    [("conversation", 288_500, 182_790, 36.6), ("synthetic", 121_877, 43_924, 64.0)],
)
def test_an_infinite_cache_finds_what_is_known(name: str, blocks: int, distinct: int, percent: float) -> None:
    trace = mooncake(name)
    run = replay(trace, "lru", None, SETTING)
    assert (run.blocks, trace.num_distinct) == (blocks, distinct)
    assert run.hit_blocks == blocks - distinct and run.evicted_blocks == run.refused_blocks == 0
    assert round(100 * run.as_dict()["block_hit_share"], 1) == percent
    assert replay(trace, Clairvoyant.name, distinct, SETTING).hit_blocks == run.hit_blocks


def test_between_nothing_and_the_clairvoyant() -> None:
    trace = mooncake("synthetic", 600)
    infinite = replay(trace, "lru", None, SETTING)
    for capacity in (300, 2000):
        bound = replay(trace, Clairvoyant.name, capacity, SETTING)
        for policy in POLICIES:
            run = replay(trace, policy, capacity, SETTING)
            assert 0 < run.hit_blocks <= bound.hit_blocks <= infinite.hit_blocks
            assert 0 < run.saved_ms < infinite.saved_ms
            assert run.evicted_blocks > 0 and run == replay(trace, policy, capacity, SETTING)


def test_lengths_blocks_and_milliseconds_by_hand() -> None:
    """Two prompts of 10 tokens in blocks of 4: the second finds 3 blocks, of which the last token is computed again."""
    rows = [TraceRow(0, 10, (1, 2, 3)), TraceRow(5, 10, (1, 2, 3)), TraceRow(6, 9, (1, 2, 7))]
    run = replay(make_cache_trace(rows, 4, COSTS), "lru", None, SETTING)
    assert (run.blocks, run.hit_blocks, run.tokens, run.hit_tokens) == (9, 5, 29, 9 + 8)

    def cost(cached: int, new: int) -> float:
        return 10 + 0.3 * new + 0.0001 * new * (cached + new / 2)

    assert run.prefill_ms == pytest.approx(2 * cost(0, 10) + cost(0, 9))
    assert run.saved_ms == pytest.approx(cost(0, 10) - cost(9, 1) + cost(0, 9) - cost(8, 1))


def test_a_scaled_trace_keeps_its_structure() -> None:
    rows = [TraceRow(0, 1025, (1, 2, 3)), TraceRow(1, 513, (1, 4))]
    trace = make_cache_trace(rows, 512, COSTS, scale=32)
    assert [prompt.tokens for prompt in trace.prompts] == [33, 17] and trace.block_tokens == 16
    assert [block.num_tokens for block in trace.prompts[0].blocks] == [16, 16, 1]
    assert trace.prompts[0].blocks[0] is trace.prompts[1].blocks[0]
    with pytest.raises(InvalidRequestError, match="cannot be divided"):
        make_cache_trace(rows, 512, COSTS, scale=3)
    with pytest.raises(InvalidRequestError, match="no requests"):
        make_cache_trace([], 512, COSTS)


def test_a_block_is_known_by_its_prefix_and_its_namespace() -> None:
    rows = [TraceRow(0, 8, (1, 2)), TraceRow(1, 8, (3, 2)), TraceRow(2, 8, (1, 2), "other"), TraceRow(3, 8, (1, 2))]
    assert replay(make_cache_trace(rows, 4, COSTS), "lru", None, SETTING).hit_blocks == 2


def test_what_expired_is_not_found() -> None:
    trace = small(["ab", "ab", "ab"], step_ms=8000)  # the TTL is 8 s
    assert replay(trace, "ttl", None, SETTING).hit_blocks == 0
    assert replay(small(["ab", "ab", "ab"], step_ms=7999), "ttl", None, SETTING).hit_blocks == 4


def test_on_second_sight_nothing_goes_for_what_is_new() -> None:
    """One block of room: "a" stays until "b" comes for the second time."""
    setting = ReplaySetting(COSTS, second_sight=True)
    assert replay(small(["a", "b", "a", "b", "b", "a"]), "lru", 1, setting).hit_blocks == 2
    assert replay(small(["a", "b", "a", "b", "b", "a"]), "lru", 1, SETTING).hit_blocks == 1


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="no policy 'mru'"):
        replay(small(["a"]), "mru", 1, SETTING)


PATHS = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=9)


@pytest.mark.parametrize("policy", NAMES)
@settings(max_examples=40, deadline=None)
@given(PATHS, st.integers(1, 5))
def test_never_too_much_never_an_orphan_never_what_is_in_use(policy: str, paths: list[str], capacity: int) -> None:
    trace = small(paths)
    one = Replay(policy, capacity, trace, SETTING)
    for prompt in trace.prompts:
        before = [block for block in prompt.blocks if block.key in one.cache.victims]
        found = one.serve(prompt)
        held = one.cache.victims
        assert len(held) <= capacity
        everything = {block.key: block for other in trace.prompts for block in other.blocks}
        here = [block for key, block in everything.items() if key in held]
        assert all(block.parent_key is None or block.parent_key in held for block in here)
        assert len(here) == len(held)
        if policy != "ttl":
            assert found == len(before) and all(block.key in held for block in before)
        leaves = {block.key for block in here} - {block.parent_key for block in here}
        assert (victim := held.next_victim(KIND)) is None or victim.key in leaves
        assert all(held.is_held(block.key) == (block.key not in leaves) for block in here)


def naive_lru(trace: CacheTrace, capacity: int) -> int:
    """LRU-leaf by search, for prompts that fit the cache: hit blocks."""
    last: dict[int, int] = {}
    here: dict[int, Block] = {}
    now = hits = 0
    for prompt in trace.prompts:
        own = {block.key for block in prompt.blocks}
        for block in prompt.blocks:
            hits += block.key in here
        for block in prompt.blocks:
            if block.key not in here and len(here) == capacity:
                parents = {other.parent_key for other in here.values()}
                loose = [key for key in here if key not in parents and key not in own]
                del here[min(loose, key=last.__getitem__)]
            here[block.key] = block
            now += 1
            last[block.key] = now
    return hits


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=15), st.integers(3, 7))
def test_lru_is_lru_leaf(paths: list[str], capacity: int) -> None:
    trace = small(paths)
    assert replay(trace, "lru", capacity, SETTING).hit_blocks == naive_lru(trace, capacity)


def best_possible(trace: CacheTrace, capacity: int) -> int:
    """The most hit blocks that any cache can have, whatever it keeps: all choices are tried."""
    after: dict[frozenset[int], int] = {frozenset(): 0}
    for prompt in trace.prompts:
        own = frozenset(block.key for block in prompt.blocks)
        best: dict[frozenset[int], int] = {}
        for kept, hits in after.items():
            found = hits + len(kept & own)
            pool = sorted(kept | own)
            sizes = range(min(capacity, len(pool)) + 1)
            for choice in map(frozenset, chain.from_iterable(combinations(pool, size) for size in sizes)):
                best[choice] = max(best.get(choice, 0), found)
        after = best
    return max(after.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=7), st.integers(1, 3))
def test_the_clairvoyant_is_the_best_possible(paths: list[str], capacity: int) -> None:
    """Even against caches that may break chains and count the pieces."""
    trace = small(paths)
    bound = replay(trace, Clairvoyant.name, capacity, SETTING).hit_blocks
    assert bound == best_possible(trace, capacity)
    assert all(replay(trace, policy, capacity, SETTING).hit_blocks <= bound for policy in POLICIES)
