"""The cost table T(cached, new): milliseconds to compute `new` tokens behind `cached` ones.

What it is: one object per model and machine: a linear model, and the runs observed so
far. The simulated runner takes its time from it. What it knows nothing about: who
measured. Invariant: only an observed point is labelled `measured`; whatever comes from
the model says `estimated`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """Milliseconds and where the number comes from: `measured` or `estimated`."""

    ms: float
    label: str


@dataclass
class CostTable:
    """Linear model `base + per_new * new + per_pair * new * (cached + new / 2)`, with the points it was fit on.

    The last term is attention: each new token reads the cached ones and half of the new ones.
    """

    base_ms: float = 0.0
    per_new_ms: float = 0.0
    per_pair_ms: float = 0.0
    points: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)

    def observe(self, cached: int, new: int, ms: float) -> None:
        """Add a measured run; repeated points keep their running mean."""
        mean, count = self.points.get((cached, new), (0.0, 0))
        self.points[cached, new] = (mean + (ms - mean) / (count + 1), count + 1)

    def estimate(self, cached: int, new: int) -> Estimate:
        """The time of one run. Measured where this very point was observed, else from the model."""
        if (cached, new) in self.points:
            return Estimate(self.points[cached, new][0], "measured")
        return Estimate(self.base_ms + self.step_ms([(cached, new)]), "estimated")

    def step_ms(self, work: Iterable[tuple[int, int]]) -> float:
        """The model's time for a batch of (cached, new) pairs, without the per-step base."""
        return sum(self.per_new_ms * new + self.per_pair_ms * new * (cached + new / 2) for cached, new in work)
