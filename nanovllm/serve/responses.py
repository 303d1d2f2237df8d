"""/v1/responses: one turn of a conversation that the server keeps, in OpenAI's shapes.

What it is: the endpoints, from body to `Answer`. What it knows nothing about: how a turn is rendered, sampled,
stored. Invariants: a response continues one earlier response, or one conversation, of the caller's own; its
instructions are its own; everything a client can get wrong is refused before the engine hears of it.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.answer import Answer
from nanovllm.serve.chat_order import Asked, asked_of
from nanovllm.serve.config import Limits
from nanovllm.serve.context import Services, Tenant, Ticket
from nanovllm.serve.item_pages import item_page, query_with_include
from nanovllm.serve.items import CONVERSATION, RESPONSE, Stored, check_count, messages_of, stored_items
from nanovllm.serve.protocol import ChatRequest, SystemMessage
from nanovllm.serve.reception import decoded, parts_of
from nanovllm.serve.response_answer import ResponseStream, ResponseWhole
from nanovllm.serve.response_draft import Draft, ResponseHead
from nanovllm.serve.response_fields import asked_facts, chat_fields, echo_of, our_name, renamed
from nanovllm.serve.response_protocol import ConversationName, ResponseRequest
from nanovllm.serve.session_hint import session_of
from nanovllm.serve.state_api import query_of
from nanovllm.serve.turn import Turn
from nanovllm.serve.turn_history import History, prompt_after
from nanovllm.serve.turn_store import Kept

PATH = "/v1/responses"
ONE = f"{PATH}/{{response_id}}"


async def create(request: Request) -> Answer:
    """The answer, to be called by whoever sends it. Raises NanoVLLMError."""
    services, ticket = parts_of(request)
    query_of(request)
    body = await decoded(request, services, ResponseRequest)
    session = session_of(request, body)
    _check(body, services.limits)
    is_kept = body.store is not False
    if is_kept or body.conversation is not None:
        await services.turns.check_room(ticket.tenant, more_objects=int(is_kept))
        session = ""  # a turn that is kept owns its KV itself: a hint would own it beside, beyond its deletion
    conversation = await _conversation(services, ticket.tenant, body)
    if conversation is None:
        return await _answer(services, ticket, body, session, None)
    claim = services.turns.claim(ticket.tenant, conversation)
    try:  # read again: the turn that had it until now has changed it
        conversation = await _conversation(services, ticket.tenant, body)
        return await _answer(services, ticket, body, session, conversation)
    except BaseException:
        services.turns.unclaim(claim)
        raise


async def retrieve(request: Request) -> Response:
    """A stored response, as it was answered; whole, because its events are not kept."""
    asked = query_with_include(request, "stream", "starting_after")
    if asked.get("stream", "false") != "false" or "starting_after" in asked:
        raise UnsupportedParameterError(
            "A stored response is given back whole.",
            param="stream" if "stream" in asked else "starting_after",
            hint="Leave it out; POST with stream: true streams the response while it is made.",
        )
    kept = await _named(request)
    return Response(str(kept.session.facts["response"]), media_type="application/json")


async def delete(request: Request) -> Response:
    """Out of every tier."""
    query_of(request)
    services, ticket = parts_of(request)
    await services.turns.drop(ticket.tenant, RESPONSE, request.path_params["response_id"], "response_id")
    gone = {"id": request.path_params["response_id"], "object": "response.deleted", "deleted": True}
    return Response(msgspec.json.encode(gone), media_type="application/json")


async def input_items(request: Request) -> Response:
    """What the response was made from: the conversation before it and its own input."""
    kept = await _named(request)
    return item_page(request, kept.session.messages[: int(kept.session.facts["num_input"])])


ROUTES = (
    Route(PATH, create, methods=["POST"]),
    Route(ONE, retrieve, methods=["GET"]),
    Route(ONE, delete, methods=["DELETE"]),
    Route(f"{ONE}/input_items", input_items, methods=["GET"]),
)


def _check(body: ResponseRequest, limits: Limits) -> None:
    check_count(0 if isinstance(body.input, str) else len(body.input), limits, "input")
    if body.previous_response_id is not None and body.conversation is not None:
        raise InvalidRequestError(
            "previous_response_id and conversation exclude each other.",
            param="previous_response_id",
            hint="A conversation remembers its own turns.",
        )
    if body.background:
        raise UnsupportedParameterError("Nothing runs in the background.", param="background", hint="Stream it.")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream: true.", param="stream_options")


async def _named(request: Request) -> Kept:
    services, ticket = parts_of(request)
    return await services.turns.find(ticket.tenant, RESPONSE, request.path_params["response_id"], "response_id")


async def _conversation(services: Services, tenant: Tenant, body: ResponseRequest) -> Kept | None:
    if body.conversation is None:
        return None
    given = body.conversation.id if isinstance(body.conversation, ConversationName) else body.conversation
    return await services.turns.find(tenant, CONVERSATION, given, "conversation")


async def _answer(
    services: Services, ticket: Ticket, body: ResponseRequest, session: str, conversation: Kept | None
) -> Answer:
    before = conversation
    if body.previous_response_id is not None:
        given = body.previous_response_id
        before = await services.turns.find(ticket.tenant, RESPONSE, given, "previous_response_id")
    held = None if before is None else before.session
    history = History() if held is None else History.of(held.messages, held.token_ids, held.facts)
    items = [*history.items, *stored_items(body.input)]
    with renamed():
        asked = asked_of(_chat(body, items), services)
        prompt = await prompt_after(services, ticket.tenant, history, asked.chat, body.knowledge)
    draft = Draft(_head(services, body, asked, conversation))
    rendering = ResponseStream(draft) if asked.streaming.is_stream else ResponseWhole(draft)
    facts = asked_facts(body, asked, prompt, services)
    turn = Turn(
        services,
        ticket,
        draft,
        rendering,
        history,
        items,
        prompt,
        facts,
        conversation,
        body.store is not False,
        session,
    )
    if turn.is_kept:
        room = services.engine.info.max_model_len - len(prompt.token_ids)
        await turn.check_room(min(asked.params.max_tokens or room, room))
    order = replace(asked.order(prompt, session), grammar_param=our_name(asked.grammar_param))
    return Answer(services, ticket, order, rendering, asked.streaming.is_stream, turn)


def _chat(body: ResponseRequest, items: list[Stored]) -> ChatRequest:
    """The same as a chat."""
    if not items:
        raise InvalidRequestError("input is empty.", param="input")
    said = [] if body.instructions is None else [SystemMessage(body.instructions)]
    return ChatRequest(messages=[*said, *messages_of(items)], **chat_fields(body))


def _head(services: Services, body: ResponseRequest, asked: Asked, conversation: Kept | None) -> ResponseHead:
    conversation_id = None if conversation is None else conversation.conversation_id
    return ResponseHead(echo_of(body, asked, conversation_id), asked.use, services.engine.info.block_size)
