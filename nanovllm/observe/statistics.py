"""Statistics: what is counted and computed about requests and their state, as pure functions.

What it is: the one place for percentiles, rates, goodput, cost, stability and the state
counter. What it knows nothing about: engines, files, clocks. Invariants: a percentile is a
value that occurred (nearest rank); what is not defined is None and never 0; a size carries
the bound of its approximation; times go in as integer nanoseconds.

    TTFT   first hand-over - arrival            (core/timeline.py: the sum of its four terms)
    TPOT   (last token - first hand-over) / (N_out - 1); none for one token   (as in `vllm bench serve`)
    ITL    one decode gap; jitter: mean |gap(i+1) - gap(i)|, as the interarrival jitter of RFC 3550, unsmoothed
    throughput   completed requests, or their tokens, / duration of the run
    goodput      completed requests that meet every objective / duration   (DistServe, OSDI 2024)
    cost         block-seconds = integral of blocks held over time; processor-seconds; each per output token
    stability    P99 / P50 of one latency; run to run: (max - min) / median of one figure
    sharing      block table entries / blocks in use: above 1 where sequences share blocks
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from nanovllm.errors import InvalidRequestError

OBJECTIVES = ("ttft", "tpot", "e2e")


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of a hundred values do not exceed (nearest rank)."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def distribution(values_ns: Sequence[float]) -> dict[str, Any]:
    """Count, mean, P50, P90, P99 and maximum in milliseconds; None where there is no value."""
    ordered = sorted(values_ns)
    if not ordered:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}
    ranks = {f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 99)}
    found = {"mean": math.fsum(ordered) / len(ordered), **ranks, "max": ordered[-1]}
    return {"count": len(ordered), **{name: round(value / 1e6, 3) for name, value in found.items()}}


def tpot_ns(gaps_ns: Sequence[int]) -> float | None:
    """Time per output token after the first: the mean decode gap. None for an answer of one token."""
    return sum(gaps_ns) / len(gaps_ns) if gaps_ns else None


def jitter_ns(gaps_ns: Sequence[int]) -> float | None:
    """Mean change from one decode gap to the next; None below two gaps. A steady stream has 0, however slow."""
    changes = [abs(after - before) for before, after in pairwise(gaps_ns)]
    return sum(changes) / len(changes) if changes else None


def per_second(count: float, duration_ns: int) -> float | None:
    """A rate; None where no time passed."""
    return count / duration_ns * 1e9 if duration_ns > 0 else None


def meets(latencies_ns: Mapping[str, float | None], slo_ms: Mapping[str, float]) -> bool:
    """Whether a request met every objective; a latency that it does not have misses its objective."""
    found = [(latencies_ns.get(name), limit_ms) for name, limit_ms in slo_ms.items()]
    return all(value is not None and value <= limit_ms * 1e6 for value, limit_ms in found)


def parse_slo(given: Sequence[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` as a mapping, in milliseconds. Raises InvalidRequestError."""
    found: dict[str, float] = {}
    for text in given:
        name, _, limit = text.partition(":")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = 0.0
        if name not in OBJECTIVES or not 0 < limit_ms < math.inf or name in found:
            hint = "Write ttft, tpot or e2e and milliseconds, each once: --slo ttft:500 --slo tpot:50."
            raise InvalidRequestError(f"slo cannot be read from {text[:40]!r}.", param="slo", hint=hint)
        found[name] = limit_ms
    return found


def tail_ratio(values: Sequence[float]) -> float | None:
    """Stability within a run: P99 / P50. None without values, or where P50 is 0."""
    ordered = sorted(values)
    if not ordered or not percentile(ordered, 50):
        return None
    return percentile(ordered, 99) / percentile(ordered, 50)


def spread(values: Sequence[float]) -> float | None:
    """Stability from run to run: (max - min) / median of one figure. None below two runs, or where the median is 0."""
    if len(values) < 2 or not median(values):
        return None
    return (max(values) - min(values)) / median(values)


class Level(NamedTuple):
    """From `at_ns` on there are `amount` of something."""

    at_ns: int
    amount: float


def levels(changes: Iterable[tuple[int, int]]) -> list[Level]:
    """(moment, +1 or -1) in any order as a step function; what happens at one moment is one level."""
    total, found = 0, list[Level]()
    for at_ns, change in sorted(changes):
        total += change
        if found and found[-1].at_ns == at_ns:
            found[-1] = Level(at_ns, total)
        else:
            found.append(Level(at_ns, total))
    return found


def integral(series: Sequence[Level], start_ns: int, end_ns: int) -> float:
    """Amount times nanoseconds over [start, end); nothing is there before the first level."""
    ends = [level.at_ns for level in series[1:]] + [end_ns]
    parts = ((max(level.at_ns, start_ns), min(end, end_ns), level.amount) for level, end in zip(series, ends))
    return math.fsum((end - start) * count for start, end, count in parts if end > start)


def time_mean(series: Sequence[Level], start_ns: int, end_ns: int) -> float | None:
    """The mean level over time; None where no time passes."""
    return integral(series, start_ns, end_ns) / (end_ns - start_ns) if end_ns > start_ns else None


class HeldState(NamedTuple):
    """The state one live sequence holds: entries of its block table, and tokens that have KV."""

    request_id: str
    blocks: int
    tokens: int
    is_prefilling: bool


@dataclass(frozen=True)
class StateCount:
    """The state counter: what lives, where, how large, at one moment between two steps.

    A request is live while it holds blocks; those still in prefill are also counted apart. Blocks are free
    (nobody holds them), of which some are cached (they can still be found), or used.
    """

    held: tuple[HeldState, ...]
    num_blocks: int
    free_blocks: int
    cached_blocks: int
    block_size: int
    block_bytes: int = 0
    num_waiting: int = 0

    @property
    def live_requests(self) -> int:
        """Sequences that hold blocks."""
        return sum(state.blocks > 0 for state in self.held)

    @property
    def prefilling_requests(self) -> int:
        """Of those, the ones whose prompt is not computed yet."""
        return sum(state.blocks > 0 and state.is_prefilling for state in self.held)

    @property
    def used_blocks(self) -> int:
        """Blocks that somebody holds, each counted once."""
        return self.num_blocks - self.free_blocks

    @property
    def sharing_factor(self) -> float | None:
        """Block table entries per used block; None where nothing is used."""
        return sum(state.blocks for state in self.held) / self.used_blocks if self.used_blocks else None

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """The pool's bytes: KV that is held, KV that can still be found, and room."""
        return {
            "kv_held": self.used_blocks * self.block_bytes,
            "kv_cached": self.cached_blocks * self.block_bytes,
            "free": (self.free_blocks - self.cached_blocks) * self.block_bytes,
        }

    def sizes(self) -> list[StateSize]:
        """Each live sequence's state, block-exact and token-exact."""
        return [state_size(state, self.block_size, self.block_bytes) for state in self.held if state.blocks]


class StateSize(NamedTuple):
    """Bytes of one sequence's state. The bound is what rounding to blocks, and reserving ahead, add."""

    request_id: str
    block_exact: int
    token_exact: int
    approximation_bound: int


def state_size(state: HeldState, block_size: int, block_bytes: int) -> StateSize:
    """Block-exact: what its table keeps from others. Token-exact: what its tokens with KV fill.

    KV bytes of a token = 2 * layers * kv_heads * head_dim * bytes per number = block_bytes / block_size.
    """
    block_exact, token_exact = state.blocks * block_bytes, state.tokens * block_bytes // block_size
    return StateSize(state.request_id, block_exact, token_exact, block_exact - token_exact)
