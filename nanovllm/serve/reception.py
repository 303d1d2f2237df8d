"""The common way in: a body read, decoded and tokenized without holding up the event loop.

What it is: what every endpoint does first. What it knows nothing about: what endpoints
answer. Invariants: no body over `LARGE_BODY` is decoded on the loop, no text is tokenized
there; what cannot fit the model is refused before it is tokenized; a template that takes
too long is the request's failure, not the server's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request

from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.serve.body import read_body
from nanovllm.serve.context import TICKET, Services, Ticket
from nanovllm.serve.conversation import Conversation, encode_conversation
from nanovllm.serve.decode import decode

LARGE_BODY = 64 * 1024  # of many small values it takes 20 ms to decode and check
RENDER_S = 1.0  # for a template and a short text
BYTES_PER_S = 256 * 1024  # more time for more text; a tenth of what a tokenizer does
Body = TypeVar("Body", bound=msgspec.Struct)
Result = TypeVar("Result")


def parts_of(request: Request) -> tuple[Services, Ticket]:
    """The server's parts, and this request's ticket."""
    services: Services = request.app.state.services
    ticket: Ticket = request.scope[TICKET]
    return services, ticket


async def decoded(request: Request, services: Services, kind: type[Body]) -> Body:
    """The body as `kind`. Raises InvalidRequestError and what reading raises."""
    data = await read_body(request, services)
    work = partial(decode, data, kind, services.limits.json_depth)
    return await in_pool(services.pool, work) if len(data) > LARGE_BODY else work()


async def in_pool(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    """`work` in a thread."""
    return await asyncio.get_running_loop().run_in_executor(pool, work)


async def within(pool: ThreadPoolExecutor, work: Callable[[], Result], limit_s: float, param: str) -> Result:
    """`work` in a thread, given up after `limit_s` from its start there. Raises InvalidRequestError."""
    loop, started = asyncio.get_running_loop(), asyncio.Event()

    def run() -> Result:
        loop.call_soon_threadsafe(started.set)
        return work()

    running = loop.run_in_executor(pool, run)
    try:
        await started.wait()
        return await asyncio.wait_for(running, limit_s)
    except TimeoutError:
        raise InvalidRequestError(
            f"The chat template took longer than {limit_s:.1f} s.", param=param, hint="Send less text."
        ) from None


async def encode_chat(
    services: Services, chat: Conversation, *, is_bounded: bool = True
) -> tuple[list[int], int | None]:
    """A conversation's token ids, which fit the model if `is_bounded`; and how many of them are the template's."""
    size = sum(len(turn["content"]) for turn in chat.messages)
    check_size(size, services, "messages")
    work = partial(encode_conversation, services.engine.tokenizer, chat)
    ids, added = await within(services.pool, work, RENDER_S + size / BYTES_PER_S, "messages")
    if is_bounded:
        check_length(len(ids), services, "messages")
    return ids, added


async def encode_text(services: Services, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """A text's token ids; special tokens in it are parsed, as in every text completion."""
    check_size(len(text), services, "prompt")
    tokenizer: ChatTokenizer = services.engine.tokenizer
    return await in_pool(services.pool, partial(tokenizer.encode, text, add_bos=add_special_tokens))


def check_size(characters: int, services: Services, param: str) -> None:
    """Raise ContextLengthError for a text that has too many tokens however it is cut."""
    if characters > services.engine.info.max_model_len * services.longest_token:
        raise ContextLengthError(
            f"The text of {characters} characters is longer than {services.engine.info.max_model_len} tokens can be.",
            param=param,
        )


def check_length(tokens: int, services: Services, param: str) -> None:
    """Raise ContextLengthError unless one token of output fits beside the prompt."""
    most = services.engine.info.max_model_len - 1
    if tokens > most:
        raise ContextLengthError(
            f"The prompt has {tokens} tokens; at most {most} fit beside one of output.",
            param=param,
            hint="Shorten it.",
        )


def longest_token(tokenizer: ChatTokenizer) -> int:
    """Letters of the longest token; it takes a look at each."""
    return max(len(tokenizer.id_to_token(token_id) or "") for token_id in range(tokenizer.vocab_size))
