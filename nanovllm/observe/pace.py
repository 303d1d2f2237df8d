"""Pace: how long a decode step takes in this run, and whether one was slow among its like.

What it is: two figures over the steps of a replay. What it knows nothing about: requests,
causes. Invariants: both are lengths of steps that occurred; a step with prompt tokens in it
sets no pace; where too few steps are alike, nothing is told about a single one.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.observe.paths import Step
from nanovllm.observe.statistics import percentile

AROUND = 8  # steps before and after one that it is compared with
FEWEST = 5  # of them, itself included, with nothing but as many decodes as it has


class Pace:
    """`best_ns`: a tenth of the decode steps are at most so long. None without decode steps."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.best_ns = None
        lengths = sorted(_length_ns(step) for step in steps if _decodes(step))
        if lengths:
            self.best_ns = int(percentile(lengths, 10))
        self._usual_ns = {step.event.seq: usual for i, step in enumerate(steps) if (usual := _usual(steps, i))}

    def usual_ns(self, step: Step) -> int | None:
        """The median length of the steps around this one that decode as many sequences; None where they are few."""
        return self._usual_ns.get(step.event.seq)


def _usual(steps: Sequence[Step], index: int) -> int | None:
    batch = _decodes(steps[index])
    around = steps[max(0, index - AROUND) : index + AROUND + 1]
    alike = sorted(_length_ns(step) for step in around if batch and _decodes(step) == batch)
    return int(percentile(alike, 50)) if len(alike) >= FEWEST else None


def _decodes(step: Step) -> int:
    """Sequences that it decodes; 0 where it computes prompt tokens too."""
    return 0 if step.event.prefill_tokens else step.event.decode_tokens


def _length_ns(step: Step) -> int:
    return step.end_ns - step.start_ns
