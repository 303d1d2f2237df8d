"""When requests arrive in an open loop: seeded times, fixed before the run.

What it is: one function. What it knows nothing about: clocks, servers. Invariants:
the same seed gives the same times; times never decrease; the first request comes at 0.

Gaps are drawn from a gamma distribution of shape b (`burstiness`) and mean 1/R, as
`vllm bench serve` does: b = 1 is a Poisson process, b < 1 comes in bursts, b > 1 is
more even. An infinite rate sends everything at once.
"""

from __future__ import annotations

import math
import random
from itertools import accumulate


def arrival_times_ns(count: int, rate: float, burstiness: float, seed: int) -> list[int]:
    """`count` times from the start of the run, `rate` a second on average."""
    if math.isinf(rate):
        return [0] * count
    draw = random.Random(f"{seed}/arrivals")  # noqa: S311  load, no secret
    gaps_s = (draw.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1))
    return [round(at_s * 1e9) for at_s in accumulate(gaps_s, initial=0.0)][:count]
