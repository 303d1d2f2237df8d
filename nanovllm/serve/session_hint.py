"""Which session a request says it belongs to: a hint for keeping and placing state, never part of a prompt.

What it is: `session_id`, the header `X-Session-ID` and `prompt_cache_key` as one string; and the end of an answer to
a request that has one. What it knows nothing about: what the engine makes of it. Invariants: it adds no message and
selects no KV; two that disagree are refused; whose session it is follows from the key, not from the string; where
there is a folder, the last byte waits for the KV that the session will want again, but not for long.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

from starlette.requests import Request

from nanovllm.engine.messages import Finished
from nanovllm.errors import InvalidRequestError
from nanovllm.serve.answer import Course, Order
from nanovllm.serve.context import Services, Ticket
from nanovllm.serve.merging import Batch
from nanovllm.serve.protocol import MAX_SESSION, Hinted

HEADER = "x-session-id"
_PRINTABLE = re.compile(rf"[!-~]{{1,{MAX_SESSION}}}")


def session_of(request: Request, body: Hinted) -> str:
    """The session's name, "" for none. `prompt_cache_key` stands in where there is no `session_id`.

    Raises InvalidRequestError where header and field differ, or the header is not 1 to 128 printable characters.
    """
    given = request.headers.getlist(HEADER)
    if len(given) > 1 or (given and not _PRINTABLE.fullmatch(given[0])):
        raise InvalidRequestError(
            f"X-Session-ID must be once 1 to {MAX_SESSION} printable ASCII characters without blanks.",
            param="X-Session-ID",
        )
    if given and body.session_id is not None and body.session_id != given[0]:
        raise InvalidRequestError(
            "session_id and the header X-Session-ID differ.", param="session_id", hint="Send one of them."
        )
    return given[0] if given else body.session_id or body.prompt_cache_key or ""


def course_of(services: Services, ticket: Ticket, order: Order) -> Course | None:
    """What ends the order's answer; None where nothing waits for it."""
    is_kept = order.session and services.engine.config.state_dir is not None
    return SessionCourse(services, ticket, order) if is_kept else None


@dataclass(eq=False)
class SessionCourse(Course):
    """The course of an answer that nobody keeps, of a session that was named."""

    services: Services
    ticket: Ticket
    order: Order
    _made: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # by prompt and sample

    def take(self, batch: Batch) -> None:
        """Remember the tokens: they name the blocks."""
        for number, deltas in batch:
            for delta in deltas:
                self._made.setdefault((number, delta.index), []).extend(delta.token_ids)

    async def before_last_byte(self, finished: list[Finished]) -> None:
        """Wait a little for the KV of every sample."""
        await asyncio.gather(*(self._written(number, made) for (number, _), made in self._made.items()))

    async def _written(self, number: int, made: list[int]) -> None:
        prompt, turns = self.order.prompts[number], self.services.turns
        namespace = self.ticket.tenant.namespace if prompt.namespace is None else prompt.namespace
        await turns.written(namespace, [*prompt.token_ids, *made], self.order.cache_salt)
