"""A place: one tier with what the state plane keeps beside it.

What it is: the tier, its victims, its breakers, its lanes, its counters, its room. What it knows nothing
about: objects. Invariants: `busy_bytes` is what writes under way will add, so that two writes do not plan
with the same room; a tier's counters only grow.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from nanovllm.core.clock import Clock
from nanovllm.state.breaker import CircuitBreaker
from nanovllm.state.catalog import Entry
from nanovllm.state.counters import Counters, Tally
from nanovllm.state.mover import InlineLane, Lane, ThreadLane, Transfer
from nanovllm.state.policies.victims import Victims
from nanovllm.state.tiers.tier import Item, Tier

HIGH, LOW = 0.95, 0.85  # reclaim begins above the one and ends below the other
SMOOTHING = 0.2
MIN_MEASURED = 1 << 16  # bytes; a text of a few hundred measures how long a thread takes to wake


@dataclass
class Bandwidth:
    """Bytes per millisecond; `estimated` until something was measured. What a small transfer takes is not bandwidth."""

    bytes_per_ms: float
    label: str = "estimated"
    is_recalled: bool = False

    @property
    def is_known(self) -> bool:
        """Whether it was measured, by this process or by one before it."""
        return self.label == "measured" or self.is_recalled

    def recall(self, bytes_per_ms: float) -> None:
        """What an earlier process measured: an estimate here, until the first transfer."""
        self.bytes_per_ms, self.is_recalled = bytes_per_ms, True

    def observe(self, size_bytes: int, ms: float) -> None:
        """A transfer took `ms`; one too small to tell is not counted."""
        if size_bytes >= MIN_MEASURED and ms > 0:
            rate = size_bytes / ms
            measured = self.label == "measured"
            self.bytes_per_ms = self.bytes_per_ms * (1 - SMOOTHING) + rate * SMOOTHING if measured else rate
            self.label = "measured"

    def fell_short(self, size_bytes: int, ms: float) -> None:
        """A transfer of so many bytes had not come after `ms`: the tier is slower than that."""
        if ms > 0 and size_bytes / ms < self.bytes_per_ms:
            self.observe(size_bytes, ms)

    def ms(self, size_bytes: int) -> float:
        """How long so many bytes take."""
        return size_bytes / self.bytes_per_ms


@dataclass(frozen=True)
class Flight:
    """Items to be written, and the transfer that is told how it went."""

    items: list[Item]
    promise: Transfer


FIRST_GUESS = 200_000.0  # bytes per ms, 200 MB/s: below what any of the tiers was measured at


class Place:
    """One tier of one state plane."""

    def __init__(self, tier: Tier, victims: Victims[Entry], clock: Clock, *, threads: bool) -> None:
        self.tier, self.victims = tier, victims
        self.reads, self.writes = CircuitBreaker(clock), CircuitBreaker(clock)
        self.tally = Tally()
        self.read_speed, self.write_speed = Bandwidth(FIRST_GUESS), Bandwidth(FIRST_GUESS)
        self.busy_bytes = 0
        self.going: list[bytes] = []  # evicted, and the tier was not told yet
        self.going_bytes = 0
        self.group: list[Flight] = []  # durable writes that wait for the one under way
        self.is_committing = False
        self.payment: Transfer | None = None  # the removal of what is owed that is under way, or was last
        self.by_kind: dict[str, int] = {}
        self.by_namespace: dict[str, int] = {}
        self.texts: Counter[str] = Counter()  # bytes whose last copy is here, by namespace: nothing evicts them
        self.texts_coming: Counter[str] = Counter()
        own_threads = threads and tier.name != "host"
        self.read_lane: Lane = ThreadLane(clock, f"{tier.name}-read") if own_threads else InlineLane(clock)
        self.write_lane: Lane = ThreadLane(clock, f"{tier.name}-write") if own_threads else InlineLane(clock)

    @property
    def name(self) -> str:
        """The tier's."""
        return self.tier.name

    @property
    def counters(self) -> Counters:
        """Of all kinds."""
        return self.tally.total

    @property
    def used_bytes(self) -> int:
        """Now, and with what is on its way."""
        return self.tier.used_bytes + self.busy_bytes - self.going_bytes

    def can_give(self, entry: Entry) -> bool:
        """Whether the entry's bytes lie here and this tier is not left alone."""
        return self.name in entry.tiers and self.reads.state != "open"

    def is_over(self, incoming: int, mark: float) -> bool:
        """Whether so many more bytes would pass that share of the quota."""
        quota = self.tier.quota_bytes
        return quota is not None and self.used_bytes + incoming > quota * mark

    def enter(self, entry: Entry) -> None:
        """The entry's bytes lie here now."""
        if self.name in entry.tiers:
            return
        entry.tiers.add(self.name)
        self._count(entry, entry.size_bytes)
        self.victims.touch(entry, 0, entry.num_tokens, hit=False)
        if entry.home == self.name:
            self.texts[entry.namespace] += entry.size_bytes
            self.victims.hold(entry.key)

    def leave(self, entry: Entry, *, by_policy: bool) -> None:
        """They no longer do."""
        if self.name not in entry.tiers:
            return
        entry.tiers.discard(self.name)
        self._count(entry, -entry.size_bytes)
        if entry.home == self.name:
            self.texts[entry.namespace] -= entry.size_bytes
            self.victims.release(entry.key)
        if by_policy:
            self.victims.evict(entry)
        else:
            self.victims.drop(entry)

    def kinds_by_excess(self, shares: dict[str, float]) -> list[str]:
        """The kinds that have bytes here, who uses most of its share first."""
        return sorted(self.by_kind, key=lambda kind: -self.by_kind[kind] / shares.get(kind, 1.0))

    def close(self) -> None:
        """End the lanes, then the tier."""
        self.read_lane.close()
        self.write_lane.close()
        self.tier.close()

    def facts(self) -> dict[str, Any]:
        """For `top`, metrics and pages."""
        c = self.counters
        return {
            "used_bytes": self.tier.used_bytes,
            "quota_bytes": self.tier.quota_bytes,
            "entries": len(self.victims),
            "by_kind": dict(self.by_kind),
            "kinds": self.tally.by_kind(),
            "breaker": {"reads": self.reads.state, "writes": self.writes.state},
            "read_bytes_per_ms": self.read_speed.bytes_per_ms,
            "read_speed_label": self.read_speed.label,
            **{name: getattr(c, name) for name in c.__dataclass_fields__},
        }

    def _count(self, entry: Entry, change: int) -> None:
        for counts, key in ((self.by_kind, entry.kind), (self.by_namespace, entry.namespace)):
            counts[key] = counts.get(key, 0) + change
            if counts[key] == 0:
                del counts[key]
