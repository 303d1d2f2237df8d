"""Kind `meta`: what the system learnt about itself, kept over restarts.

What it is: the cost table, tier bandwidths, popularity counters, each a small JSON text under a name. What
it knows nothing about: what is in them. Naming: the name. Value: none, it is never a candidate.
Consistency: the last write wins; a wrong value costs time, never an answer. Isolation: the operator's.
"""

from __future__ import annotations

from typing import ClassVar

from nanovllm.core.cost_table import CostTable
from nanovllm.state.kinds.kind import Kind
from nanovllm.state.objects import Storable

COST_TABLE = "cost_table"
BANDWIDTHS = "bandwidths"


class Meta(Kind):
    """Small, durable, the operator's."""

    name: ClassVar = "meta"
    generation: ClassVar = "measured while serving"
    residency: ClassVar = "as long as the folder"
    reuse: ClassVar = "the same machine and model"
    correctness: ClassVar = "advice: it changes when something is done, never what is answered"
    transfer: ClassVar = "kilobytes"
    lost: ClassVar = "some minutes of learning"
    durable: ClassVar = True

    def accepts(self, obj: Storable) -> bool:
        """A text: JSON."""
        return isinstance(obj, str)


def cost_table_record(table: CostTable) -> dict[str, object]:
    """A cost table as plain data; points become a list, because JSON has no tuples as keys."""
    points = [[cached, new, mean, count] for (cached, new), (mean, count) in sorted(table.points.items())]
    return {
        "base_ms": table.base_ms,
        "per_new_ms": table.per_new_ms,
        "per_pair_ms": table.per_pair_ms,
        "points": points,
    }


def cost_table_from(record: dict[str, object]) -> CostTable:
    """The table again. Raises ValueError, KeyError or TypeError on what is none."""
    points = record["points"]
    if not isinstance(points, list):
        raise ValueError("points is no list")
    known = {(int(cached), int(new)): (float(mean), int(count)) for cached, new, mean, count in points}
    base, per_new, per_pair = (float(str(record[name])) for name in ("base_ms", "per_new_ms", "per_pair_ms"))
    return CostTable(base, per_new, per_pair, known)
