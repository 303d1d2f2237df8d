"""The selection against a naive one: random uses, holds, evictions, for every policy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.clock import VirtualClock
from nanovllm.state.policies.heap import SLACK, ScoreHeap
from nanovllm.state.policies.lru import LRU
from nanovllm.state.policies.policy import Policy
from nanovllm.state.policies.registry import POLICIES
from nanovllm.state.policies.victims import Victims
from tests.state.policy_objects import NaiveVictims, Thing, policy_of

# A small forest: "a" < "aa" < "aaa", "ab"; "b" < "ba"; of two tenants.
FOREST = {
    key: Thing(key, key[:-1] or None, size_bytes=size, cost_ms=cost, namespace=key[0])
    for key, size, cost in [("a", 100, 5.0), ("aa", 50, 5.0), ("aaa", 100, 9.0), ("ab", 100, 0.5), ("b", 100, 5.0),
                            ("ba", 400, 5.0)]
}  # fmt: skip
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "hold", "release", "evict", "evict", "drop", "of", "wait"]),
        st.sampled_from(sorted(FOREST)),
        st.integers(0, 50),
        st.integers(1, 50),
    ),
    max_size=60,
)


class Pair:
    """The real selection and the naive one, each with its own policy, told the same."""

    def __init__(self, name: str) -> None:
        self.clock = VirtualClock()
        self.policy = policy_of(name, self.clock)
        self.real: Victims[Thing] = Victims({"kv": self.policy})
        self.naive = NaiveVictims(policy_of(name, self.clock))

    def use(self, key: str, cached: int, new: int) -> None:
        """As a prompt does: the whole chain, root first."""
        for link in (key[:end] for end in range(1, len(key) + 1)):
            hit = link in self.real
            self.real.touch(FOREST[link], cached, new, hit)
            self.naive.touch(FOREST[link], cached, new, hit)

    def hold(self, key: str) -> None:
        self.real.hold(key)
        self.naive.outside[key] = self.naive.outside.get(key, 0) + 1

    def release(self, key: str) -> None:
        if self.naive.outside.get(key):
            self.real.release(key)
            self.naive.outside[key] -= 1

    def evict(self) -> None:
        victim = self.real.next_victim("kv")
        assert victim == self.naive.next_victim()
        if victim is not None:
            self.real.evict(victim)
            self.naive.policy.on_evict([victim])
            del self.naive.things[victim.key]

    def drop(self, key: str) -> None:
        """Only what has no child here: whoever drops a chain starts at its end."""
        thing = self.real.get(key)
        if thing is not None and not any(other.parent_key == key for other in self.naive.things.values()):
            self.real.drop(thing)
            self.naive.policy.forget(thing)
            del self.naive.things[thing.key]

    def check(self) -> None:
        assert len(self.real) == len(self.naive.things)
        assert self.real.next_victim("kv") == self.naive.next_victim()
        for key in FOREST:
            assert self.real.is_held(key) == self.naive.is_held(key)
        ranked = self.real.ranked("kv", 3)
        assert [thing for _, thing in ranked] == self.naive.candidates()[:3]
        assert all(score == self.naive.policy.score(thing) for score, thing in ranked)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_like_the_naive_selection(name: str, steps: list[tuple[str, str, int, int]]) -> None:
    pair = Pair(name)
    for what, key, cached, new in steps:
        if what == "use":
            pair.use(key, cached, new)
        elif what == "evict":
            pair.evict()
        elif what == "of":
            assert pair.real.next_victim("kv", key[0]) == pair.naive.next_victim(key[0])
        elif what == "wait":
            pair.clock.advance(cached * 10**9)
        else:
            getattr(pair, what)(key)
        pair.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "push", "discard", "pop"]), st.integers(0, 5), st.integers(0, 3))))
def test_a_heap_like_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    heap, naive = ScoreHeap(), dict[int, tuple[int, int]]()
    for turn, (what, key, score) in enumerate(steps):
        if what == "push":
            heap.push(key, score, turn)
            naive[key] = (score, turn)
        elif what == "discard":
            heap.discard(key)
            naive.pop(key, None)
        elif (first := heap.peek()) is not None:
            heap.discard(first)
            del naive[first]
        assert heap.peek() == min(naive, key=naive.__getitem__, default=None)
        assert len(heap) == len(naive) and set(heap) == set(naive)


def test_a_heap_does_not_grow_with_what_was_replaced() -> None:
    heap = ScoreHeap()
    for turn in range(10_000):
        heap.push(turn % 10, turn, turn)
    assert len(heap._entries) <= 2 * 10 + SLACK
    for _ in range(10_000):  # taken out and put back as it was, as a lease does it
        heap.discard(1)
        heap.push(1, 0, 1)
    assert len(heap._entries) <= 2 * 10 + SLACK


def test_children_and_holds_keep_and_a_freed_parent_can_go() -> None:
    victims: Victims[Thing] = Victims({"kv": LRU()})
    parent, child = Thing("p"), Thing("c", "p")
    victims.touch(parent, 0, 20, False)
    victims.touch(child, 0, 20, False)
    assert victims.next_victim("kv") is child
    victims.hold("c")
    assert victims.next_victim("kv") is None
    with pytest.raises(ValueError, match="held"):
        victims.evict(parent)
    victims.release("c")
    victims.evict(child)
    assert victims.next_victim("kv") is parent and not victims.is_held("p")


def test_a_hold_may_come_before_its_object() -> None:
    victims: Victims[Thing] = Victims({"kv": LRU()})
    victims.hold("p")
    victims.touch(Thing("p"), 0, 10, False)
    assert victims.next_victim("kv") is None
    victims.release("p")
    assert victims.next_victim("kv") == Thing("p")
    with pytest.raises(KeyError):
        victims.release("p")


def test_kinds_are_never_compared() -> None:
    kinds: dict[str, Policy] = {"kv": LRU(), "knowledge": policy_of("pgdsf")}
    victims: Victims[Thing] = Victims(kinds)
    block, document = Thing("b"), Thing("d", kind="knowledge")
    victims.touch(document, 0, 10, False)
    victims.touch(block, 0, 10, False)
    assert victims.next_victim("kv") is block and victims.next_victim("knowledge") is document
    assert [thing for _, thing in victims.ranked("knowledge", 5)] == [document]
