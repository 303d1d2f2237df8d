"""Pages of items: OpenAI's list shape over what a stored turn holds.

What it is: the page, and the query that asks for it. What it knows nothing about: storage. Invariants: a page has at
most 100 items; `after` names an item of the same list; newest first unless `order` is `asc`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.errors import InvalidRequestError, StateNotFoundError, UnsupportedParameterError
from nanovllm.serve.state_api import limit_of, query_of

PAGE = "20"
ORDERS = ("desc", "asc")
INCLUDE, INCLUDABLE = ("include", "include[]"), "reasoning.encrypted_content"


def item_page(request: Request, items: Sequence[Mapping[str, Any]]) -> Response:
    """The page that the query asks for. Raises InvalidRequestError, StateNotFoundError."""
    asked = query_with_include(request, "after", "limit", "order")
    order = asked.get("order", ORDERS[0])
    if order not in ORDERS:
        raise InvalidRequestError("order is desc or asc.", param="order")
    limit = limit_of(asked.get("limit", PAGE))
    ordered = [*items] if order == "asc" else [*reversed(items)]
    start = _after(ordered, asked["after"]) if "after" in asked else 0
    return listed(ordered[start : start + limit], has_more=len(ordered) > start + limit)


def query_with_include(request: Request, *known: str) -> dict[str, str]:
    """As `query_of`; `include` may ask for what there never is, as in a body. Raises InvalidRequestError."""
    asked = query_of(request, *known, *INCLUDE)
    for name in INCLUDE:
        if asked.pop(name, INCLUDABLE) != INCLUDABLE:
            raise UnsupportedParameterError("There is nothing of that to include.", param="include", hint=INCLUDABLE)
    return asked


def listed(shown: Sequence[Mapping[str, Any]], *, has_more: bool = False) -> Response:
    """A list of things that have ids."""
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    page = {"object": "list", "data": shown, **ends, "has_more": has_more}
    return Response(msgspec.json.encode(page), media_type="application/json")


def _after(items: Sequence[Mapping[str, Any]], given: str) -> int:
    place = next((i for i, item in enumerate(items) if item["id"] == given), None)
    if place is None:
        raise StateNotFoundError(f"There is no item {given!r:.80} here.", param="after")
    return place + 1
