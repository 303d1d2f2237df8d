"""One turn that may be kept: what happens between its last token and its last byte.

What it is: the `Course` of a response. What it knows nothing about: HTTP, how objects are stored. Invariants: a
turn whose client can know that it ended is kept whole; a conversation has all of a turn or nothing, by one write, and
whatever response of it is found belongs to a turn that it has, because the response is stored after it (a kill in
between leaves an id that nothing is behind, and whose end nobody was told); one whose request did not come to its end
is not kept; its conversation is given back whatever happens; the KV that was written by then is a matter of time,
never of success.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec

from nanovllm.engine.messages import Finished
from nanovllm.errors import DeadlineError, NanoVLLMError, StateRefusedError
from nanovllm.serve import sse
from nanovllm.serve.answer import Course, Prompt
from nanovllm.serve.context import Services, Ticket
from nanovllm.serve.items import CONVERSATION, RESPONSE, Stored
from nanovllm.serve.response_answer import ResponseStream, ResponseWhole
from nanovllm.serve.response_draft import Draft
from nanovllm.serve.turn_history import History, diagnose
from nanovllm.serve.turn_store import Kept
from nanovllm.state.objects import Session

TOKEN_BYTES, FACTS_BYTES = 24, 4096  # of a token in a stored turn, and of what stands beside its text
IN_CONVERSATION = "The conversation has the turn all the same: look before you ask again."


@dataclass(eq=False)
class Turn(Course):
    """One response on its way into the store. `items`: the history and this turn's input."""

    services: Services
    ticket: Ticket
    draft: Draft
    rendering: ResponseWhole | ResponseStream
    history: History
    items: Sequence[Stored]
    prompt: Prompt
    asked: Mapping[str, Any]
    conversation: Kept | None
    is_stored: bool
    session: str  # where it is not kept

    async def before_last_byte(self, finished: list[Finished]) -> None:
        """Count, keep, and wait a little for the KV. A client that leaves now leaves a whole turn behind."""
        self._count(finished)
        if self.is_kept:
            with anyio.CancelScope(shield=True):
                await self._keep()
        if self.is_kept or self.session:
            await self.services.turns.written(self._kv_namespace, self._token_ids)

    async def check_room(self, max_tokens: int) -> None:
        """Before anything is computed. Raises SessionQuotaError where so long a turn would find no room.

        The size is an estimate: items twice as JSON, and of each token its id and what is usual of its text.
        """
        tokens = len(self.prompt.token_ids) + max_tokens
        size = 2 * len(msgspec.json.encode(self.items)) + TOKEN_BYTES * tokens + FACTS_BYTES
        old = 0 if self.conversation is None else self.conversation.obj.payload_bytes
        copies = self.is_stored + (self.conversation is not None)
        await self.services.turns.check_room(
            self.ticket.tenant, more_objects=int(self.is_stored), more_bytes=max(copies * size - old, 0)
        )

    def failed(self, error: dict[str, dict[str, str | None]]) -> bytes:
        """In the stream's own words."""
        return self.rendering.failed(error) if isinstance(self.rendering, ResponseStream) else sse.frame(error)

    def over(self) -> None:
        """The conversation is free for the next turn."""
        if self.conversation is not None:
            self.services.turns.unclaim((self.ticket.tenant.owner, self.conversation.obj.state_id))

    @property
    def is_kept(self) -> bool:
        """As a response, in a conversation, or both."""
        return self.is_stored or self.conversation is not None

    @property
    def _kv_namespace(self) -> str:
        """Where the prompt's KV lies."""
        return self.ticket.tenant.namespace if self.prompt.namespace is None else self.prompt.namespace

    @property
    def _token_ids(self) -> list[int]:
        return [*self.prompt.token_ids, *self.draft.token_ids]

    def _count(self, finished: list[Finished]) -> None:
        self.draft.finish(finished)
        block_size = self.services.engine.info.block_size
        found = diagnose(self.history, self.prompt.token_ids, self.asked, finished, block_size)
        if found is not None and self.draft.usage is not None:
            self.draft.diagnostics = found.as_openai()
            self.draft.usage["nanovllm"] |= found.as_own()

    async def _keep(self) -> None:
        """The conversation first; it is as it was before where the response is refused."""
        turns, tenant, talk = self.services.turns, self.ticket.tenant, self.conversation
        if talk is not None:
            await turns.replace(tenant, talk, self._talk(talk), self._kv_namespace)
        if self.is_stored:
            try:
                await turns.keep(tenant, self._response(), self.draft.head.response_id, self._kv_namespace)
            except DeadlineError:
                raise  # it may still be stored: then its conversation must have the turn
            except NanoVLLMError as error:
                if talk is not None and not await turns.put_back(tenant, talk):
                    raise StateRefusedError(error.message, hint=IN_CONVERSATION) from None
                raise

    def _response(self) -> Session:
        text = msgspec.json.encode(self.draft.as_object()).decode()
        facts = {"object": RESPONSE, "response": text, "num_input": len(self.items), "asked": dict(self.asked)}
        return Session([*self.items, *self.draft.output], self._token_ids, facts)

    def _talk(self, conversation: Kept) -> Session:
        items, token_ids = [*self.items, *self.draft.output], self._token_ids
        facts = {**conversation.session.facts, "object": CONVERSATION, "asked": dict(self.asked)}
        facts |= self.history.facts_after(len(self.items), len(self.prompt.token_ids), len(items), token_ids)
        return Session(items, token_ids, facts)
