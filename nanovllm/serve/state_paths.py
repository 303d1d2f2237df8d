"""The operator's paths, for the OpenAPI document.

What it is: rows as openapi.py has them, and what their queries may say. What it knows nothing about: how they are
answered. Invariant: a parameter that is not here is refused there. `bytes` stands for a bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nanovllm.serve import state_protocol as protocol
from nanovllm.serve import state_replies as replies
from nanovllm.serve.state_api import IMPORT_PATH, OBJECT, OBJECTS
from nanovllm.state.objects import KINDS
from nanovllm.state.receipts import Explanation, Receipt
from nanovllm.state.report import MAX_PAGE

# path, method, request, reply, event of a stream, summary
ENDPOINTS: tuple[tuple[str, str, Any, Any, Any, str], ...] = (
    (OBJECTS, "get", None, replies.ObjectsReply, None, "A page of objects, the oldest first"),
    (OBJECTS, "post", protocol.PutBody, Receipt, None, "Keep an object"),
    (OBJECT, "get", None, replies.WholeObjectReply, None, "An object and what was put, verified"),
    (OBJECT, "put", protocol.UpdateBody, Receipt, None, "An object's next generation"),
    (OBJECT, "delete", None, Receipt, None, "Out of every tier"),
    (f"{OBJECT}/explain", "get", None, Explanation, None, "What is known of an object, and its receipts"),
    (f"{OBJECT}/export", "get", None, bytes, None, "The object and its KV as a bundle"),
    (f"{OBJECT}/pin", "post", protocol.PinBody, Receipt, None, "Keep its bytes in a tier"),
    (f"{OBJECT}/unpin", "post", protocol.UnpinBody, Receipt, None, "Give the claim back"),
    (f"{OBJECT}/migrate", "post", protocol.MigrateBody, Receipt, None, "Bring its bytes to a tier"),
    (f"{OBJECT}/fork", "post", protocol.ForkBody, Receipt, None, "A second object that begins as the first"),
    ("/state/evict", "post", protocol.EvictBody, Receipt, None, "Free room"),
    ("/state/verify", "post", protocol.VerifyBody, Receipt, None, "Read and check everything"),
    ("/state/tiers", "get", None, replies.TiersReply, None, "Bytes, hits and failures of each tier"),
    (IMPORT_PATH, "post", bytes, Receipt, None, "Take a bundle in, whole or not at all"),
)
PATHS = frozenset(path for path, *_ in ENDPOINTS)


def _query(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema or {"type": "string"}}


_PAGE = (
    _query("namespace"), _query("kind", type="string", enum=[*KINDS]), _query("name"), _query("after"),
    _query("limit", type="integer", minimum=1, maximum=MAX_PAGE),
)  # fmt: skip
QUERIES: Mapping[tuple[str, str], tuple[dict[str, Any], ...]] = MappingProxyType(
    {
        **{(path, method): (_query("namespace"),) for path, method, *_ in ENDPOINTS if path.startswith(OBJECT)},
        (OBJECTS, "get"): _PAGE,
        (IMPORT_PATH, "post"): (_query("name"), _query("version"), _query("namespace")),
    }
)
# statuses beside the usual ones of a call without a body
CALLS: Mapping[str, tuple[str, ...]] = MappingProxyType(dict.fromkeys(PATHS, ("400", "409", "504", "507")))
