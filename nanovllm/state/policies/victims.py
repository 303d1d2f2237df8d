"""Who may go, and who of them goes next: the selection, apart from the scores.

What it is: the objects of one tier with the holds on them. A hold is any reason to stay: a pin, a lease, a move in
flight; a child is a hold on its parent, which makes eviction leaf-only. Quotas choose from whom to take
(`namespace`). What it knows nothing about: why something is held, bytes, where the objects lie.

Invariants: an object is a candidate exactly while it is here and nothing holds it; of equal scores the one that was
touched longest ago goes first; scores of different kinds are never compared; every call is O(log n) amortised,
whatever is held (the first question about a namespace reads all of its kind once).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from heapq import nsmallest
from typing import Any, Generic, TypeVar

from nanovllm.state.policies.heap import ScoreHeap
from nanovllm.state.policies.policy import Cached, Policy, Remembers

T = TypeVar("T", bound=Cached)


class Victims(Generic[T]):
    """Candidates of one tier by score, one policy per kind.

    victims = Victims({"kv": LRU(), "knowledge": PGDSF(cost)})
    victims.touch(obj, cached_tokens, new_tokens, hit)    # at every use; enters it if it is new
    victims.hold(key); victims.release(key)               # leases, pins, moves in flight; counted
    obj = victims.next_victim("kv")                       # then move its bytes, then:
    victims.evict(obj)
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._policies = dict(policies)
        self._objects: dict[Hashable, T] = {}
        self._touched: dict[Hashable, int] = {}  # when last, in touches
        self._touches = 0
        self._holds: dict[Hashable, int] = {}
        self._heaps: dict[tuple[str, str | None], ScoreHeap] = {(kind, None): ScoreHeap() for kind in policies}

    def __len__(self) -> int:
        return len(self._objects)

    def __contains__(self, key: object) -> bool:
        return key in self._objects

    def get(self, key: Hashable) -> T | None:
        """The object of that key, if it is here."""
        return self._objects.get(key)

    def touch(self, obj: T, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """A request used `obj`; one that was not here enters. Its kind, namespace and parent stay until it leaves."""
        key = obj.key
        self._policies[obj.kind].on_access(obj, cached_tokens, new_tokens, hit)
        if key not in self._objects and obj.parent_key is not None:
            self.hold(obj.parent_key)
        self._objects[key] = obj
        self._touches += 1
        self._touched[key] = self._touches
        if key not in self._holds:
            self._offer(obj)

    def hold(self, key: Hashable) -> None:
        """One more reason for `key` to stay, here already or not yet."""
        count = self._holds.get(key, 0)
        self._holds[key] = count + 1
        if count == 0 and (obj := self._objects.get(key)) is not None:
            self._withdraw(obj)

    def release(self, key: Hashable) -> None:
        """One reason less. Raises KeyError where there was none."""
        count = self._holds[key]
        if count > 1:
            self._holds[key] = count - 1
            return
        del self._holds[key]
        if (obj := self._objects.get(key)) is not None:
            self._offer(obj)

    def is_held(self, key: Hashable) -> bool:
        """Whether anything keeps it."""
        return key in self._holds

    def next_victim(self, kind: str, namespace: str | None = None) -> T | None:
        """The candidate of the lowest score; of one tenant, where `namespace` is given. Changes nothing."""
        key = self._heap(kind, namespace).peek()
        return None if key is None else self._objects[key]

    def evict(self, obj: T) -> None:
        """`obj` goes by the policy's choice. Raises ValueError where something holds it."""
        if obj.key in self._holds:
            raise ValueError(f"{obj.key!r} is held and cannot be evicted")
        self._policies[obj.kind].on_evict((obj,))
        self._remove(obj)

    def drop(self, obj: T) -> None:
        """`obj` goes for another reason, held or not; holds on its key stay with their holders."""
        self._policies[obj.kind].forget(obj)
        self._remove(obj)

    def score(self, obj: T) -> float:
        """What its kind's policy says."""
        return self._policies[obj.kind].score(obj)

    def memory(self, most: int) -> dict[str, list[tuple[Any, ...]]]:
        """By kind: the `most` keys worth most with what their policy knows of them, the lowest first."""
        rows = {kind: policy.memory(most) for kind, policy in self._policies.items() if isinstance(policy, Remembers)}
        return {kind: found for kind, found in rows.items() if found}

    def recall(self, kind: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """What an earlier policy knew; of what is not here, nothing."""
        policy = self._policies.get(kind)
        if not isinstance(policy, Remembers):
            return
        for key, *values in rows:
            obj = self._objects.get(key)
            if obj is not None and obj.kind == kind:
                policy.recall(obj, values)
                if key not in self._holds:
                    self._offer(obj)

    def ranked(self, kind: str, count: int) -> list[tuple[float, T]]:
        """The `count` next candidates with their scores, for a receipt. O(n log count)."""
        offered = ((self.score(obj), obj) for obj in (self._objects[key] for key in self._heaps[kind, None]))
        return nsmallest(count, offered, key=lambda pair: (pair[0], self._touched[pair[1].key]))

    def _heap(self, kind: str, namespace: str | None) -> ScoreHeap:
        heap = self._heaps.get((kind, namespace))
        if heap is None:
            heap = self._heaps[kind, namespace] = ScoreHeap()
            for obj in [self._objects[key] for key in self._heaps[kind, None]]:
                if obj.namespace == namespace:
                    heap.push(obj.key, self.score(obj), self._touched[obj.key])
        return heap

    def _heaps_of(self, obj: T) -> list[ScoreHeap]:
        own = self._heaps.get((obj.kind, obj.namespace))
        return [self._heaps[obj.kind, None]] if own is None else [self._heaps[obj.kind, None], own]

    def _offer(self, obj: T) -> None:
        score = self.score(obj)
        for heap in self._heaps_of(obj):
            heap.push(obj.key, score, self._touched[obj.key])

    def _withdraw(self, obj: T) -> None:
        for heap in self._heaps_of(obj):
            heap.discard(obj.key)

    def _remove(self, obj: T) -> None:
        self._withdraw(obj)
        del self._objects[obj.key], self._touched[obj.key]
        if obj.parent_key is not None:
            self.release(obj.parent_key)
