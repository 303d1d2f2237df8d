"""Settings of a state plane: limits, deadlines and marks, with their defaults.

What it is: one frozen record. What it knows nothing about: where it is read from. Invariant: every bound
that a caller can run into has a name here, which the refusal names, too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StateSettings:
    """What a state plane allows itself and others.

    `removal_deadline_ms`: until a deletion is told to be done or not; clients were promised five seconds.
    `objects_per_namespace`, `text_bytes_per_namespace`: of one kind, what one tenant may have put; hints count by
    themselves. `namespace_bytes`: what one tenant may hold in one tier (None: as much as there is). `pinned_share`: of
    a tier, what pins may hold together. `layout`, `layers`: how a block's bytes lie, where no device says so.
    `hints_per_namespace`, `hint_blocks`, `hint_ttl_s`: of sessions that requests only name. `session_tail`: tokens at
    a session's end that its next turn may have to compute again, where room is wanted.
    """

    block_size: int = 16
    layout: str = ""
    layers: int = 1
    read_deadline_ms: float = 2_000.0
    write_deadline_ms: float = 10_000.0
    removal_deadline_ms: float = 4_000.0
    max_object_bytes: int = 4 << 20
    objects_per_namespace: int = 10_000
    text_bytes_per_namespace: int = 1 << 30
    namespace_bytes: int | None = None
    pinned_share: float = 0.5
    hints_per_namespace: int = 1_000
    hint_blocks: int = 2_048
    hint_ttl_s: float = 86_400.0
    session_tail: int = 128
