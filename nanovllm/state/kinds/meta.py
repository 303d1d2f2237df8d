"""Kind `meta`: what the system learnt about itself, kept over restarts.

What it is: the cost table, tier bandwidths, popularity, pins, receipts, each a small JSON text under a name. What
it knows nothing about: what is in them. Naming: the name. Value: none, it is never a candidate.
Consistency: the last write wins; a wrong value costs time, never an answer. Isolation: the operator's.
"""

from __future__ import annotations

from typing import ClassVar

from nanovllm.state.kinds.kind import Kind
from nanovllm.state.objects import Storable

COST_TABLE = "cost_table"  # what computing costs
BANDWIDTHS = "bandwidths"  # how fast each tier was
POPULARITY = "popularity"  # what the policies know of which blocks
PINS = "pins"
RECEIPTS = "receipts"


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
