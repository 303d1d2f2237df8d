"""/v1/conversations: a history that turns are added to, by POST /v1/responses or by hand.

What it is: the endpoints. What it knows nothing about: how turns are answered, where objects lie. Invariants: a
conversation is one object, read and written whole by one caller at a time; items are never changed, only added
and deleted; its metadata is the client's, its name unique for its tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.errors import InvalidRequestError, StateNotFoundError
from nanovllm.serve.item_pages import item_page, listed, query_with_include
from nanovllm.serve.items import CONVERSATION, RESERVED, check_count, stored_items
from nanovllm.serve.reception import decoded, parts_of
from nanovllm.serve.response_protocol import ConversationRequest, ConversationUpdate, ItemsRequest
from nanovllm.serve.state_api import json_of, query_of
from nanovllm.serve.turn_history import without_item
from nanovllm.serve.turn_store import CONVERSATION_PREFIX, Kept
from nanovllm.state.objects import Session

PATH = "/v1/conversations"
ONE = f"{PATH}/{{conversation_id}}"
ITEMS = f"{ONE}/items"
Change = Callable[[Session], Session]


async def create(request: Request) -> Response:
    """A conversation, empty or with its first items."""
    services, ticket = parts_of(request)
    query_of(request)
    body = await decoded(request, services, ConversationRequest)
    if body.name is not None and body.name.startswith(RESERVED):
        raise InvalidRequestError(f"A name does not begin with {' or '.join(RESERVED)}.", param="name")
    await services.turns.check_room(ticket.tenant)
    items = stored_items(body.items or [], "items")
    session = Session(items, (), {"object": CONVERSATION, "metadata": body.metadata or {}})
    with _in_items():
        state_id = await services.turns.keep(ticket.tenant, session, body.name)
    kept = await services.turns.find(ticket.tenant, CONVERSATION, CONVERSATION_PREFIX + state_id, "conversation_id")
    return json_of(shown(kept))


async def find(request: Request) -> Response:
    """The conversation of a name, as a list of one or none; this server's own, for clients that start again."""
    services, ticket = parts_of(request)
    name = query_of(request, "name").get("name")
    if not name:
        raise InvalidRequestError("Which conversation? Only those that have a name can be found.", param="name")
    return listed([shown(kept) for kept in await services.turns.named(ticket.tenant, name)])


async def retrieve(request: Request) -> Response:
    """A conversation without its items."""
    query_of(request)
    return json_of(shown(await _named(request)))


async def update(request: Request) -> Response:
    """Other metadata."""
    services, _ = parts_of(request)
    query_of(request)
    body = await decoded(request, services, ConversationUpdate)
    await _change(
        request, lambda talk: Session(talk.messages, talk.token_ids, {**talk.facts, "metadata": body.metadata})
    )
    return json_of(shown(await _named(request)))


async def delete(request: Request) -> Response:
    """Out of every tier."""
    query_of(request)
    services, ticket = parts_of(request)
    given = request.path_params["conversation_id"]
    await services.turns.drop(ticket.tenant, CONVERSATION, given, "conversation_id")
    gone = {"id": given, "object": "conversation.deleted", "deleted": True}
    return json_of(gone)


async def items(request: Request) -> Response:
    """A page of its items."""
    return item_page(request, (await _named(request)).session.messages)


async def add_items(request: Request) -> Response:
    """More items at its end."""
    services, ticket = parts_of(request)
    query_with_include(request)
    added = stored_items((await decoded(request, services, ItemsRequest)).items, "items")
    await services.turns.check_room(ticket.tenant, more_objects=0)

    def longer(talk: Session) -> Session:
        check_count(len(talk.messages) + len(added), services.limits, "items")
        return Session([*talk.messages, *added], talk.token_ids, talk.facts)

    with _in_items():
        await _change(request, longer)
    return listed(added)


async def item(request: Request) -> Response:
    """One item."""
    query_with_include(request)
    kept = await _named(request)
    return json_of(kept.session.messages[_place(kept.session.messages, request)])


async def delete_item(request: Request) -> Response:
    """A conversation without one of its items, and without what was computed with it."""
    query_of(request)
    await _change(request, lambda talk: without_item(talk, _place(talk.messages, request)), erase=True)
    return json_of(shown(await _named(request)))


ROUTES = (
    Route(PATH, create, methods=["POST"]),
    Route(PATH, find, methods=["GET"]),
    Route(ONE, retrieve, methods=["GET"]),
    Route(ONE, update, methods=["POST"]),
    Route(ONE, delete, methods=["DELETE"]),
    Route(ITEMS, items, methods=["GET"]),
    Route(ITEMS, add_items, methods=["POST"]),
    Route(f"{ITEMS}/{{item_id}}", item, methods=["GET"]),
    Route(f"{ITEMS}/{{item_id}}", delete_item, methods=["DELETE"]),
)


def shown(kept: Kept) -> dict[str, Any]:
    """A conversation as clients see it."""
    facts = {"object": CONVERSATION, "created_at": kept.created, "metadata": kept.session.facts.get("metadata", {})}
    return {"id": kept.conversation_id, **facts, "name": kept.obj.name}


async def _named(request: Request) -> Kept:
    services, ticket = parts_of(request)
    given = request.path_params["conversation_id"]
    return await services.turns.find(ticket.tenant, CONVERSATION, given, "conversation_id")


async def _change(request: Request, change: Change, *, erase: bool = False) -> None:
    """Read, change, write, while nobody else does; `erase` as for `replace`. Raises StateConflictError."""
    services, ticket = parts_of(request)
    kept = await _named(request)
    with services.turns.claimed(ticket.tenant, kept):
        fresh = await _named(request)
        await services.turns.replace(ticket.tenant, fresh, change(fresh.session), erase=erase)


@contextmanager
def _in_items() -> Iterator[None]:
    """What is too large came in `items` here."""
    try:
        yield
    except InvalidRequestError as error:
        error.param = "items" if error.param == "input" else error.param
        raise


def _place(stored: Sequence[Any], request: Request) -> int:
    given = request.path_params["item_id"]
    place = next((i for i, each in enumerate(stored) if each["id"] == given), None)
    if place is None:
        raise StateNotFoundError(f"There is no item {given!r:.80} in this conversation.", param="item_id")
    return place
