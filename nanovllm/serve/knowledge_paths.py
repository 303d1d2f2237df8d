"""The paths of documents, for the OpenAPI document.

What it is: rows as openapi.py has them, and what their queries may say. What it knows nothing about: how they are
answered. Invariant: a parameter that is not here is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nanovllm.serve import knowledge_replies as replies
from nanovllm.serve.state_api import KNOWLEDGE_PATH
from nanovllm.serve.state_protocol import KnowledgeBody

_ONE = f"{KNOWLEDGE_PATH}/{{name}}"
# path, method, request, reply, event of a stream, summary
ENDPOINTS: tuple[tuple[str, str, Any, Any, Any, str], ...] = (
    (KNOWLEDGE_PATH, "post", KnowledgeBody, replies.KnowledgeReply, None, "Keep a document for later questions"),
    (KNOWLEDGE_PATH, "get", None, replies.DocumentsReply, None, "Your own documents and the public ones"),
    (_ONE, "get", None, replies.DocumentReply, None, "A document, by name, name@version or id"),
    (_ONE, "delete", None, replies.DroppedReply, None, "Remove a document, and the KV that only it owned"),
)


def _query(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": {**schema}}


QUERIES: Mapping[tuple[str, str], tuple[dict[str, Any], ...]] = MappingProxyType(
    {
        (KNOWLEDGE_PATH, "get"): (
            _query("name", {"type": "string"}),
            _query("after", {"type": "string"}),
            _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        ),
        (_ONE, "delete"): (_query("scope", {"type": "string", "enum": ["own", "public"]}),),
    }
)
# statuses beside the usual ones of a call without a body
CALLS: Mapping[str, tuple[str, ...]] = MappingProxyType({path: ("504",) for path, *_ in ENDPOINTS})
