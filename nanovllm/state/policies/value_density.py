"""Cost-aware value density: what saves the fewest milliseconds per byte, at its recent rate of use, goes first.

    value   = sum over its uses of 2 ** (-(now - t_i) / half_life) * max(0, cost_ms - load_ms) / size_bytes
    score   = ln value, measured at the clock's origin instead of now

The sum is LRFU's combined recency and frequency (D. Lee et al., "LRFU: A Spectrum of Policies that Subsumes the Least
Recently Used and Least Frequently Used Policies", IEEE Transactions on Computers 50(12), 2001); the benefit is what a
hit saves over computing again, less what loading it from this tier costs.

What it is: that value. What it knows nothing about: how costs were measured. Invariants: all values fade at one rate,
so their order does not change with time and a heap of scores stays true; what is not worth loading scores NEVER.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import exp, log, log1p

from nanovllm.core.clock import Clock
from nanovllm.state.policies.policy import NEVER, Cached
from nanovllm.state.policies.scored import Scored

LoadOf = Callable[[Cached], float]  # milliseconds to bring the object from its tier to where it is used
NS = 10**9


def free_load(obj: Cached) -> float:
    """The tier where objects are used: nothing is loaded."""
    return 0.0


class ValueDensity(Scored):
    """Score: logarithm of the milliseconds per byte that its faded uses would save, up to a term common to all."""

    name = "value_density"

    def __init__(self, clock: Clock, half_life_s: float, load_of: LoadOf = free_load) -> None:
        super().__init__()
        self._clock, self._load_of = clock, load_of
        self._start_ns, self._fade_ns = clock.now_ns(), half_life_s * NS / log(2)
        self._uses: dict[Hashable, float] = {}  # ln of the faded count

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """One look at the clock; O(1)."""
        now = (self._clock.now_ns() - self._start_ns) / self._fade_ns
        before = self._uses.get(obj.key)
        uses = self._uses[obj.key] = now if before is None else now + log1p(exp(before - now))
        saved_ms = obj.cost_ms - self._load_of(obj)
        self._scores[obj.key] = uses + log(saved_ms / obj.size_bytes) if saved_ms > 0 else NEVER

    def forget(self, obj: Cached) -> None:
        """O(1)."""
        super().forget(obj)
        self._uses.pop(obj.key, None)
