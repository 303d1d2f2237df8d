"""What /state answers with, as types: for the OpenAPI document.

What it is: the shapes of `state/report.py`'s plain data; receipts and explanations are the state plane's own. What
it knows nothing about: how they are made. Invariant: an object's fields are those that `object_facts` tells, taken
from the same record, so that neither forgets one.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct, structs

from nanovllm.serve.replies import ErrorBody
from nanovllm.state.objects import StateObject
from nanovllm.state.receipts import Receipt
from nanovllm.state.report import OMITTED

_FIELDS = [(field.name, field.type) for field in structs.fields(StateObject) if field.name not in OMITTED]
ObjectReply = msgspec.defstruct("ObjectReply", [*_FIELDS, ("num_blocks", int)], forbid_unknown_fields=True)
WholeObjectReply = msgspec.defstruct(
    "WholeObjectReply", [*_FIELDS, ("num_blocks", int), ("content", dict[str, Any])], forbid_unknown_fields=True
)
ObjectsReply = msgspec.defstruct(
    "ObjectsReply",
    [("objects", list[ObjectReply]), ("next", str | None)],  # type: ignore[valid-type]
    forbid_unknown_fields=True,
)


class TiersReply(Struct, forbid_unknown_fields=True):
    """Counters and bytes of each tier, by its name; `Place.facts` says which."""

    objects: int
    transfers: int
    tiers: dict[str, dict[str, Any]]


class StateErrorReply(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A refusal; of an action, with its receipt."""

    error: ErrorBody
    receipt: Receipt | None = None
