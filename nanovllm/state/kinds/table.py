"""The kinds by name, and the table of what sets them apart.

What it is: one mapping. What it knows nothing about: who asks. Invariant: it names exactly the kinds of
`objects.KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nanovllm.state.kinds.kind import Kind
from nanovllm.state.kinds.knowledge import Knowledge
from nanovllm.state.kinds.kv import KV
from nanovllm.state.kinds.meta import Meta
from nanovllm.state.kinds.session import Session

KIND_TABLE: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in (KV(), Knowledge(), Session(), Meta())})
COLUMNS = ("generation", "residency", "reuse", "correctness", "transfer", "lost")


def table_rows() -> list[tuple[str, ...]]:
    """One row per property, one column per kind."""
    return [(column, *(str(getattr(kind, column)) for kind in KIND_TABLE.values())) for column in COLUMNS]
