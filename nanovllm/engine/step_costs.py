"""StepCosts: what computing costs on this machine, learned from the steps that prefilled.

What it is: a line through (new tokens, milliseconds) of recent steps, handed out as a `CostTable`. What it
knows nothing about: who asks. Invariants: before the first observation nothing is known, and nobody is told
a number; every figure is `estimated`; old steps fade, so a machine that becomes busy is noticed. Attention's
growth with the context is not separated from the tokens' own cost: a long prefix is somewhat underestimated.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.core.cost_table import CostTable

MIN_TOKENS = 16  # below it a step measures its own overhead
FADE = 0.95


@dataclass
class StepCosts:
    """Faded sums of a least-squares line."""

    weight: float = 0.0
    sum_x: float = 0.0
    sum_y: float = 0.0
    sum_xx: float = 0.0
    sum_xy: float = 0.0

    def observe(self, new: int, ms: float) -> None:
        """A step computed `new` tokens in `ms`; decode steps and very small ones are not counted."""
        if new < MIN_TOKENS or ms <= 0:
            return
        values = (1.0, float(new), ms, float(new * new), new * ms)
        old = (self.weight, self.sum_x, self.sum_y, self.sum_xx, self.sum_xy)
        self.weight, self.sum_x, self.sum_y, self.sum_xx, self.sum_xy = (
            a * FADE + b for a, b in zip(old, values, strict=True)
        )

    @property
    def is_known(self) -> bool:
        """Whether any step has been observed."""
        return self.weight > 0

    def table(self) -> CostTable:
        """The line as T(cached, new); zero where nothing is known."""
        if not self.is_known:
            return CostTable()
        variance = self.weight * self.sum_xx - self.sum_x * self.sum_x
        through_origin = self.sum_y / self.sum_x
        if variance <= 1e-9 * self.weight * self.sum_xx:
            return CostTable(per_new_ms=through_origin)
        slope = (self.weight * self.sum_xy - self.sum_x * self.sum_y) / variance
        base = (self.sum_y - slope * self.sum_x) / self.weight
        return CostTable(base, slope) if slope > 0 and base >= 0 else CostTable(per_new_ms=through_origin)

    def ms(self, cached: int, new: int) -> float:
        """T(cached, new) in milliseconds; 0 where nothing is known."""
        return self.table().estimate(cached, new).ms
