"""What is counted: a histogram that takes many values at once, a counter that outlives its source.

What it is: two small sums, and their form as a metric family. What it knows nothing about:
names, engines, who reads them. Invariants: a total never goes down; values are integers
and bounds are compared with them exactly; nothing here locks, so one thread (the event
loop) writes and reads. prometheus_client's own classes take a lock a value and walk the
buckets in Python: a thousand gaps of one long answer would cost it a millisecond.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

MANY = 16  # from here on sorting the values costs less than a search for each


class Histogram:
    """Buckets of integer values; `per_unit` of them are one of the unit that is exported (10**9 ns are a second)."""

    def __init__(self, bounds: Sequence[float], per_unit: int = 1) -> None:
        self._bounds = [round(bound * per_unit) for bound in bounds]
        self._labels = [floatToGoString(bound) for bound in (*bounds, float("inf"))]
        self._per_unit = per_unit
        self._counts = [0] * len(self._labels)
        self.sum = 0

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self._counts)

    def observe(self, value: int, times: int = 1) -> None:
        """One value, or the same one several times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def observe_all(self, values: Sequence[int]) -> None:
        """Many values, cheaply: the bounds are looked for among the values, not the values among the bounds."""
        if len(values) < MANY:
            for value in values:
                self.observe(value)
            return
        ordered, before = sorted(values), 0
        for i, bound in enumerate(self._bounds):
            upto = bisect_right(ordered, bound, before)
            self._counts[i] += upto - before
            before = upto
        self._counts[-1] += len(ordered) - before
        self.sum += sum(ordered)

    def family(self, name: str, text: str, labels: dict[str, str]) -> HistogramMetricFamily:
        """As Prometheus exports it: cumulative, in units."""
        family = HistogramMetricFamily(name, text, labels=list(labels))
        buckets = list(zip(self._labels, accumulate(map(float, self._counts)), strict=True))
        family.add_metric(list(labels.values()), buckets, sum_value=self.sum / self._per_unit)
        return family


class Monotone:
    """A total read from a source that starts again at 0: an engine process that was replaced."""

    def __init__(self) -> None:
        self.total = self._last = 0

    def read(self, value: int) -> None:
        """What the source says now. Less than the last time means that it started again."""
        self.total += value - self._last if value >= self._last else value
        self._last = value
