"""Records: what a recorded run consists of, and how each of them looks as JSON.

What it is: the schema of a recording, in both directions. What it knows nothing about:
files, readers, what records mean. Invariants: a record holds no prompt text and no token
ids; what is written is read back equal; a record with a field too many, too few or of
another type is refused with a sentence. A record without the key `record` is a request event.

    {"schema":1,"record":"header", ...}                      the first line: what ran, on what, under which policy
    {"schema":1,"seq":0,"ts_ns":0,"request_id":"req-1","stage":"entered","epoch":0,...}     request events
    {"schema":1,"record":"step" | "wait" | "block" | "move", "seq":1,"ts_ns":0, ...}        the others
    {"schema":1,"record":"end","dropped":0,"omitted":0,"processor_ns":0}                    the last line of a whole run
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nanovllm.core.events import (
    BLOCK_CALLS,
    MOVES,
    OUTCOMES,
    SCHEMA,
    STAGES,
    WAIT_REASONS,
    BlockEvent,
    Event,
    MoveEvent,
    RequestEvent,
    StepEvent,
    WaitEvent,
)
from nanovllm.errors import shown

LABELS = ("measured", "simulated")
PRIOR_STATES = ("cold", "warm")
_NAMES = {StepEvent: "step", WaitEvent: "wait", BlockEvent: "block", MoveEvent: "move"}
_KINDS: dict[str | None, type[Event]] = {None: RequestEvent, **{name: kind for kind, name in _NAMES.items()}}
_TEXTS = frozenset(
    {
        "request_id",
        "stage",
        "reason",
        "behind",
        "action",
        "medium",
        "digest",
        "parent",
        "move",
        "tier",
        "outcome",
        "kinds",
    }
)
_SETS: dict[str, tuple[str, ...]] = {
    "stage": STAGES,
    "reason": WAIT_REASONS,
    "move": MOVES,
    "outcome": OUTCOMES,
    "label": LABELS,
    "prior_state": PRIOR_STATES,
}
_NOT_WRITTEN = frozenset({"token_ids"})
_LEFT_OUT: dict[str, object] = {
    "tokens": 0,
    "sample": 0,
    "block_ns": None,
    "medium": "device",
    "kinds": "",
}  # where they say this
MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class RunHeader:
    """What a run was: its model, its state and its policy. With them behaviour can be judged, without them not.

    `prior_state` is `warm` where blocks could be found before the first request came.
    """

    label: str
    model: str
    weights: str
    dtype: str
    policy: str
    schedule_mode: str
    block_size: int
    num_blocks: int
    block_bytes: int
    prefix_mode: str
    prior_state: str
    seed: int
    version: str
    command: str
    knobs: dict[str, int] = field(default_factory=dict)  # limits of a step and of admission; 0: no limit


@dataclass(frozen=True)
class RunEnd:
    """How a recording ended: events lost before they could be written, records beyond the bound, processor time."""

    dropped: int = 0
    omitted: int = 0
    processor_ns: int = 0


def header_record(header: RunHeader) -> dict[str, Any]:
    """The first line."""
    return {"schema": SCHEMA, "record": "header", **asdict(header)}


def end_record(end: RunEnd) -> dict[str, Any]:
    """The last line."""
    return {"schema": SCHEMA, "record": "end", **asdict(end)}


def to_record(event: Event) -> dict[str, Any]:
    """One event as a record."""
    name = _NAMES.get(type(event))
    kind = {} if name is None else {"record": name}
    return {"schema": SCHEMA, **kind, **{key: value for key, value in _items(event) if key not in _NOT_WRITTEN}}


def from_record(record: Mapping[str, Any]) -> Event | RunEnd:
    """The event that a record stands for, or how the recording ended. Raises ValueError with a sentence."""
    kind = record.get("record")
    if kind == "end":
        return RunEnd(**_checked(record, {f.name: "int" for f in fields(RunEnd)}, {}))
    if not isinstance(kind, str | None) or kind not in _KINDS:
        raise ValueError(f"record {shown(kind)} is unknown")
    event = _KINDS[kind]
    names = [name for name in event._fields if name not in _NOT_WRITTEN]
    types = {name: "text" if name in _TEXTS else "times" if name == "block_ns" else "int" for name in names}
    values = _checked(record, types, _LEFT_OUT)
    if event is BlockEvent:
        digests = {name: bytes.fromhex(values[name]) for name in ("digest", "parent")}
        return BlockEvent(**{**values, **digests, "token_ids": None})
    return event(**values)


def header_from(record: Mapping[str, Any]) -> RunHeader:
    """The header that the first line stands for. Raises ValueError with a sentence."""
    if record.get("record") != "header":
        raise ValueError("the first line is not a header: this is no recording, or its beginning is missing")
    kinds = {"str": "text", "int": "int"}
    types = {f.name: kinds.get(str(f.type), "knobs") for f in fields(RunHeader)}
    values = _checked(record, types, {})
    for name in ("block_size", "num_blocks"):
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1")
    return RunHeader(**values)


def _items(event: Event) -> list[tuple[str, Any]]:
    pairs = zip(event._fields, event, strict=True)
    plain = [(name, value.hex() if isinstance(value, bytes) else value) for name, value in pairs]
    return [(name, value) for name, value in plain if name not in _LEFT_OUT or _LEFT_OUT[name] != value]


def _checked(record: Mapping[str, Any], types: Mapping[str, str], optional: Mapping[str, object]) -> dict[str, Any]:
    """The fields named in `types`, each of its type. Whatever else is there is refused."""
    if record.get("schema") != SCHEMA:
        raise ValueError(f"schema {shown(record.get('schema'))} is not {SCHEMA}, the one this version reads")
    for name in record:
        if name not in types and name not in ("schema", "record"):
            raise ValueError(f"the field {shown(name)} is unknown")
    values: dict[str, Any] = {}
    for name, kind in types.items():
        if name not in record and name not in optional:
            raise ValueError(f"the field {name!r} is missing")
        values[name] = _value(name, kind, record[name]) if name in record else optional[name]
    return values


def _value(name: str, kind: str, value: Any) -> Any:
    if name in _SETS and value not in _SETS[name]:
        raise ValueError(f"{name} must be one of {', '.join(_SETS[name])}, not {shown(value)}")
    if kind == "times" and isinstance(value, list) and len(value) == len(BLOCK_CALLS):
        return tuple(_value(name, "int", part) for part in value)
    if kind == "knobs" and isinstance(value, dict) and len(value) < 64:
        return {key: _value(key, "int", part) for key, part in value.items()}
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "int" and type(value) is int and 0 <= value <= MAX_INT:
        return value
    raise ValueError(f"{name} cannot be {shown(value)}")
