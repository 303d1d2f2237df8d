"""Knowledge: a tenant's documents and the public ones, from their names to the prompts that carry them.

What it is: what chat and responses call with `knowledge`, and what uploads go through. What it knows nothing
about: HTTP. Invariants: what a tenant sees is its own and what is public, whichever way it is named; every prompt
looks names up anew, so that a new version or a removal is seen by the next one; a prompt with a document of a
tenant's own has its KV in that tenant's namespace, even where prefixes are shared.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.device_state_tier import engine_namespace, store_namespace
from nanovllm.engine.knowledge_prompt import Passage, chat_segments, ids_of, in_order, passage_of, spans_of
from nanovllm.errors import DeadlineError, InvalidRequestError, StateNotFoundError
from nanovllm.serve.answer import Prompt
from nanovllm.serve.context import Services, Tenant
from nanovllm.serve.conversation import COUNTED_BYTES, Conversation
from nanovllm.serve.knowledge_prefill import Prefills
from nanovllm.serve.reception import BYTES_PER_S, RENDER_S, check_length, check_size, encode_chat, in_pool, within
from nanovllm.state.objects import PUBLIC, StateObject

KIND = "knowledge"
MOST_TOKENS = 500_000  # of documents that are kept tokenized
TRIES = 3  # a version may be replaced between two looks at it


@dataclass
class Knowledge:
    """The documents of one server. `shares_kv`: prompts of public documents have one namespace for everybody."""

    engine: AsyncEngine
    shares_kv: bool
    timeout_s: float

    def __post_init__(self) -> None:
        self.prefills = Prefills(self.engine, self.timeout_s)
        self._passages: OrderedDict[tuple[str, int], Passage] = OrderedDict()
        self._num_tokens = 0

    async def call(self, verb: str, **arguments: Any) -> Any:
        """The store's own answer. Raises what it raises, and DeadlineError where the engine takes too long."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.engine.call_state(verb, **arguments)
        except TimeoutError:
            raise DeadlineError(f"The engine did not answer within {self.timeout_s:g} s.") from None

    async def find(self, tenant: Tenant, name: str) -> StateObject:
        """The document of an id, `name` or `name@version` that the tenant may see. Raises StateNotFoundError."""
        return await self._find(name, store_namespace(tenant.owner))

    async def passages(self, services: Services, tenant: Tenant, names: Sequence[str]) -> list[Passage]:
        """The documents as prompts carry them, in their order there. Raises StateNotFoundError, naming the field."""
        if len(names) > services.limits.knowledge:
            raise InvalidRequestError(f"At most {services.limits.knowledge} documents are allowed.", param="knowledge")
        asked = [self._passage(services, tenant, name, f"knowledge[{i}]") for i, name in enumerate(names)]
        return in_order(await asyncio.gather(*asked))

    def forget(self, *, state_id: str = "", namespace: str = "", label: str = "") -> None:
        """It was removed, or replaced by another text of its name: no copy of it stays here."""
        for key, passage in [*self._passages.items()]:
            if key[0] == state_id or (passage.namespace, passage.label) == (namespace, label):
                self._num_tokens -= len(self._passages.pop(key).token_ids)

    async def called(self, namespace: str, name: str) -> list[StateObject]:
        """Documents of a namespace to be removed: the one of an id or `name@version`, else all versions of a name; and
        what an earlier removal left of them. An id goes before a name, as where a document is looked at.

        Raises StateNotFoundError where there is none.
        """
        found: list[StateObject] = await self.call("ls", namespace=namespace, kind=KIND, name=name)
        left: list[StateObject] = await self.call("leaving", state_id=name, namespace=namespace, kind=KIND)
        called = {obj.state_id: obj for obj in (*left, *found, *await self._of_id(name, namespace))}
        meant = [called[name]] if name in called else called.values()
        own = [obj for obj in meant if obj.namespace == namespace]
        if not own:
            raise _not_there(name, "name")
        return own

    def namespace_for(self, tenant: Tenant, passages: Sequence[Passage]) -> str:
        """Where the KV of such a prompt lies."""
        is_shared = all(passage.namespace == PUBLIC for passage in passages)
        return tenant.namespace if is_shared else tenant.owner

    def kv_namespace_of(self, namespace: str) -> str | None:
        """Where the KV of a document alone is computed; None where every tenant has its own."""
        if namespace == PUBLIC:
            return "" if self.shares_kv else None
        return engine_namespace(namespace)

    async def _of_id(self, name: str, namespace: str) -> list[StateObject]:
        """The document of which that is the id, if there is one."""
        try:
            obj = await self._find(name, namespace)
        except StateNotFoundError:
            return []
        return [obj] if obj.state_id == name else []

    async def _find(self, name: str, namespace: str, param: str = "name") -> StateObject:
        try:
            found: StateObject = await self.call("find", state_id=name, namespace=namespace, kind=KIND)
        except StateNotFoundError:
            raise _not_there(name, param) from None
        return found

    async def _passage(self, services: Services, tenant: Tenant, name: str, param: str) -> Passage:
        last: StateNotFoundError | None = None
        for _ in range(TRIES):
            obj = await self._find(name, store_namespace(tenant.owner), param)
            key = obj.state_id, obj.generation
            if key in self._passages:
                self._passages.move_to_end(key)
                return self._passages[key]
            try:
                document = await self.call("get", state_id=obj.state_id)
            except StateNotFoundError as error:  # replaced since it was found, or its bytes are lost
                last = error
                continue
            work = partial(passage_of, services.engine.tokenizer, document, obj.label, obj.namespace)
            return self._keep(key, await in_pool(services.pool, work))
        raise StateNotFoundError(str(last), param=param)

    def _keep(self, key: tuple[str, int], passage: Passage) -> Passage:
        """Remember it; what was used longest ago goes."""
        if key not in self._passages:
            self._passages[key] = passage
            self._num_tokens += len(passage.token_ids)
        while self._num_tokens > MOST_TOKENS and len(self._passages) > 1:
            _, gone = self._passages.popitem(last=False)
            self._num_tokens -= len(gone.token_ids)
        return passage


def _not_there(name: str, param: str) -> StateNotFoundError:
    """One answer, whether it is nobody's or another tenant's."""
    hint = "GET /state/knowledge lists them."
    return StateNotFoundError(f"There is no document {name!r:.80} of yours.", param=param, hint=hint)


async def prompt_of(
    services: Services, tenant: Tenant, chat: Conversation, names: Sequence[str] | None, known: Sequence[int] = ()
) -> Prompt:
    """A conversation as the engine takes it, with the documents of these names in its system message.

    Beside documents it goes on in the `known` ids of the turn before, where that one had the same.
    Raises StateNotFoundError (404) where a name is none of the tenant's own or public documents,
    InvalidRequestError where the model has no place for them, ContextLengthError.
    """
    if not names:
        return Prompt(*await encode_chat(services, chat))
    knowledge = services.knowledge
    passages = await knowledge.passages(services, tenant, names)
    size = sum(len(turn["content"]) for turn in chat.messages)
    check_size(size, services, "messages")
    check_length(sum(len(passage.token_ids) for passage in passages), services, "knowledge")
    tokenizer = services.engine.tokenizer
    render = partial(chat_segments, tokenizer, chat.messages, passages, chat.add_generation_prompt, chat.tools)
    work = partial(render, known=known, **chat.variables)
    segments = await within(services.pool, work, RENDER_S + size / BYTES_PER_S, "messages")
    ids = ids_of(segments)
    check_length(len(ids), services, "messages")
    said = None if size > COUNTED_BYTES else tokenizer.count_content_tokens(chat.messages)
    added = None if said is None else max(0, len(segments[0].content) + len(segments[-1].content) - said)
    carried = tuple(passage.identity for passage in passages)
    return Prompt(ids, added, spans_of(segments), knowledge.namespace_for(tenant, passages), carried)
