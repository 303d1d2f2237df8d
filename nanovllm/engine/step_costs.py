"""StepCosts: what computing costs on this machine, learned from the steps that prefilled.

What it is: a least-squares fit of recent steps' milliseconds over one, their tokens and their token pairs (what
attention reads), handed out as a `CostTable`. What it knows nothing about: who asks. Invariants: before the first
observation nothing is known, and nobody is told a number; every figure is `estimated`; no term is negative: one that
the steps do not bear out is left out; old steps fade, so a machine that becomes busy is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanovllm.core.cost_table import CostTable

MIN_TOKENS = 16  # below it a step measures its own overhead
FADE = 0.95
TERMS = (("base_ms", "per_new_ms", "per_pair_ms"), ("base_ms", "per_new_ms"), ("per_new_ms", "per_pair_ms"))
MAX_CONDITION = 1e5  # above it the steps were too much alike to tell two terms apart


@dataclass
class StepCosts:
    """Faded sums of a least-squares fit: products of (1, tokens, pairs) with each other, and with milliseconds."""

    products: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    moments: np.ndarray = field(default_factory=lambda: np.zeros(3))
    _table: CostTable | None = None

    def observe(self, new: int, ms: float, pairs: float = 0.0) -> None:
        """A step computed `new` tokens that read `pairs` of tokens in `ms`; decode steps and tiny ones do not count."""
        if new < MIN_TOKENS or ms <= 0:
            return
        row = np.array([1.0, new, pairs])
        self.products = self.products * FADE + np.outer(row, row)
        self.moments = self.moments * FADE + row * ms
        self._table = None

    @property
    def is_known(self) -> bool:
        """Whether any step has been observed."""
        return bool(self.products[0, 0] > 0)

    def table(self) -> CostTable:
        """The fit as T(cached, new); zero where nothing is known."""
        if not self.is_known:
            return CostTable()
        if self._table is None:
            fits = (self._fit(terms) for terms in TERMS)
            line = CostTable(per_new_ms=float(self.moments[0] / self.products[0, 1]))
            self._table = next((fit for fit in fits if fit is not None), line)
        return self._table

    def ms(self, cached: int, new: int) -> float:
        """T(cached, new) in milliseconds; 0 where nothing is known."""
        return self.table().estimate(cached, new).ms

    def record(self) -> dict[str, Any]:
        """The sums as plain data, to be kept over a restart."""
        return {"products": self.products.tolist(), "moments": self.moments.tolist()}

    def recall(self, record: Mapping[str, Any]) -> None:
        """Go on from a record. Raises ValueError, KeyError or TypeError on what is none."""
        products = np.array(record["products"], dtype=float)
        moments = np.array(record["moments"], dtype=float)
        is_sound = products.shape == (3, 3) and moments.shape == (3,) and np.isfinite([*products.flat, *moments]).all()
        if not is_sound or (products < 0).any() or (moments < 0).any():
            raise ValueError("these are no sums of steps")
        self.products, self.moments, self._table = products, moments, None

    def _fit(self, terms: tuple[str, ...]) -> CostTable | None:
        """The fit of these terms alone; None where the steps do not bear them out."""
        columns = [TERMS[0].index(term) for term in terms]
        products, moments = self.products[np.ix_(columns, columns)], self.moments[columns]
        scale = np.sqrt(products.diagonal())
        if (scale == 0).any():
            return None
        scaled = products / np.outer(scale, scale)
        if np.linalg.cond(scaled) > MAX_CONDITION:
            return None
        values = np.linalg.solve(scaled, moments / scale) / scale
        return CostTable(**dict(zip(terms, values.tolist(), strict=True))) if (values >= 0).all() else None
