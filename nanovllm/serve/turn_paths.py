"""The paths of stored turns, for the OpenAPI document.

What it is: rows as openapi.py has them, and what their queries may say. What it knows nothing about: how they are
answered. Invariant: a parameter that is not here is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nanovllm.serve import response_protocol as protocol
from nanovllm.serve import response_replies as replies

_RESPONSE = "/v1/responses/{response_id}"
_CONVERSATION = "/v1/conversations/{conversation_id}"
_ITEM = f"{_CONVERSATION}/items/{{item_id}}"
# path, method, request, reply, event of a stream, summary
ENDPOINTS: tuple[tuple[str, str, Any, Any, Any, str], ...] = (
    (
        "/v1/responses",
        "post",
        protocol.ResponseRequest,
        replies.ResponseReply,
        replies.ResponseEvent,
        "Answer a turn, and keep it",
    ),
    (_RESPONSE, "get", None, replies.ResponseReply, None, "A stored response"),
    (_RESPONSE, "delete", None, replies.DeletedReply, None, "Delete a response, and the KV that only it owned"),
    (f"{_RESPONSE}/input_items", "get", None, replies.ItemsReply, None, "What a response was made from"),
    (
        "/v1/conversations",
        "post",
        protocol.ConversationRequest,
        replies.ConversationReply,
        None,
        "Begin a conversation",
    ),
    ("/v1/conversations", "get", None, replies.ConversationsReply, None, "The conversation of a name"),
    (_CONVERSATION, "get", None, replies.ConversationReply, None, "A conversation"),
    (_CONVERSATION, "post", protocol.ConversationUpdate, replies.ConversationReply, None, "Other metadata"),
    (_CONVERSATION, "delete", None, replies.DeletedReply, None, "Delete a conversation, and the KV only it owned"),
    (f"{_CONVERSATION}/items", "get", None, replies.ItemsReply, None, "Its items"),
    (f"{_CONVERSATION}/items", "post", protocol.ItemsRequest, replies.ItemsReply, None, "Add items"),
    (_ITEM, "get", None, replies.ItemReply, None, "One item"),
    (_ITEM, "delete", None, replies.ConversationReply, None, "Delete an item"),
)


def _query(name: str, schema: Mapping[str, Any], *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": {**schema}}


_PAGE = (
    _query("after", {"type": "string"}),
    _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
    _query("order", {"type": "string", "enum": ["asc", "desc"]}),
)
QUERIES: Mapping[tuple[str, str], tuple[dict[str, Any], ...]] = MappingProxyType(
    {
        (f"{_RESPONSE}/input_items", "get"): _PAGE,
        (f"{_CONVERSATION}/items", "get"): _PAGE,
        ("/v1/conversations", "get"): (_query("name", {"type": "string"}, required=True),),
    }
)
# statuses beside the usual ones of a call without a body
CALLS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {path: ("400", "409", "504") if path == _ITEM else ("400", "504") for path, *_ in ENDPOINTS}
)
