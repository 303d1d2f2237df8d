"""One answer on its way: engine streams in, one JSON body or a stream of events out.

What it is: the ASGI application an endpoint returns. It submits the request's prompts and
owns their streams. What it knows nothing about: chat, text, tools; those render. Invariants:
whatever ends the answer (its end, a failure, a client that is gone or takes nothing), every
stream is closed; nothing is sent before the first output, or a heartbeat's time, so that
what the engine refuses has its status; one `send` for everything a step made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import anyio
from starlette.types import Message, Receive, Scope, Send

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import SegmentSpan
from nanovllm.engine.messages import Finished
from nanovllm.engine.request_stream import RequestStream
from nanovllm.errors import ExecutionError, NanoVLLMError
from nanovllm.serve import sse
from nanovllm.serve.context import Services, Ticket
from nanovllm.serve.failures import error_object, is_internal
from nanovllm.serve.merging import Batch, merged

JSON_HEADERS = [(b"content-type", b"application/json")]
ENDINGS = ("stop", "length")


class Course:
    """What else belongs to the course of an answer; endpoints that keep something say what."""

    def take(self, batch: Batch) -> None:
        """What a step made."""

    async def before_last_byte(self, finished: list[Finished]) -> None:
        """All prompts have ended: what must happen before the client may know it. Raises what fails the answer."""

    def failed(self, error: dict[str, dict[str, str | None]]) -> bytes:
        """The last frames of a stream that failed."""
        return sse.frame(error)

    def over(self) -> None:
        """The answer has ended, whatever ended it."""


class Rendering(Protocol):
    """What an endpoint makes of the engine's output."""

    def add(self, batch: Batch) -> bytes:
        """Take in a step's deltas, each with the number of its prompt; the frames to send, if it streams."""
        ...

    def end(self, finished: list[Finished]) -> bytes:
        """All prompts have ended: the last frames, or the whole body."""
        ...


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the engine takes it; in the tenant's namespace where none is named."""

    token_ids: list[int]
    template_tokens: int | None = None
    segments: tuple[SegmentSpan, ...] = ()
    namespace: str | None = None
    documents: tuple[str, ...] = ()  # which ones it carries: equal where they are the same text at the same place


@dataclass(frozen=True)
class Order:
    """What is submitted: each prompt with the same parameters."""

    prompts: list[Prompt]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    model: str = ""  # as the client called it
    grammar_param: str = "response_format"  # the field that a grammar which cannot be compiled came from
    session: str = ""  # the client's name for what belongs together


class Answer:
    """Submits an order when called, and answers it."""

    def __init__(
        self,
        services: Services,
        ticket: Ticket,
        order: Order,
        rendering: Rendering,
        is_stream: bool,
        course: Course | None = None,
    ) -> None:
        self._services, self._ticket, self._order = services, ticket, order
        self._rendering, self._is_stream = rendering, is_stream
        self._course = course or Course()
        self._streams: list[RequestStream] = []
        self._has_started = self._is_complete = False
        self._sent_s = time.monotonic()  # when the last send ended
        self._sending_s: float | None = None  # when the one under way began
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; raises what happened before the first byte."""
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(until_gone, receive, group.cancel_scope)
                group.start_soon(self._watch_time, send, group.cancel_scope)
                await anyio.lowlevel.checkpoint()  # a client that left meanwhile is noticed here
                try:
                    await self._produce(send)
                except Exception as error:  # noqa: BLE001  whatever it is, the client hears of it
                    failure = self._named(error)
                    await self._fail(send, failure)
                group.cancel_scope.cancel()
        finally:
            for stream in self._streams:
                stream.close()
            self._course.over()
            self._trace(scope, failure)
        if failure is not None and (is_internal(failure) or not self._has_started):
            raise failure  # the gate answers it, or logs it where the answer is under way

    async def _produce(self, send: Send) -> None:
        self._submit()
        async with aclosing(merged(self._streams)) as batches:
            async for batch in batches:
                _check_endings(batch)
                self._course.take(batch)
                data = self._rendering.add(batch)
                if data:
                    await self._write(send, data, is_last=False)
        await self._course.before_last_byte(self._finished)
        await self._write(send, self._rendering.end(self._finished), is_last=True)
        self._is_complete = True

    @property
    def _finished(self) -> list[Finished]:
        return [stream.finished for stream in self._streams if stream.finished is not None]

    def _trace(self, scope: Scope, failure: Exception | None) -> None:
        if self._services.traces is not None:
            self._services.traces.record(
                scope,
                self._order.model,
                self._order.params,
                self._finished,
                is_complete=self._is_complete,
                is_stream=self._is_stream,
                failure=failure,
            )

    def _submit(self) -> None:
        services, order = self._services, self._order
        sequences = order.params.n * len(order.prompts)
        self._ticket.revise(sum(len(prompt.token_ids) for prompt in order.prompts), sequences)
        arrival_ns = self._ticket.arrival_ns
        spent_s = (time.monotonic_ns() - arrival_ns) / 1e9
        on_start = _after(len(order.prompts), self._ticket.started)
        for prompt in order.prompts:
            self._streams.append(
                services.engine.submit(
                    prompt.token_ids,
                    order.params,
                    namespace=prompt.namespace if prompt.namespace is not None else self._ticket.tenant.namespace,
                    cache_salt=order.cache_salt,
                    priority=order.priority,
                    template_tokens=prompt.template_tokens,
                    session_id=order.session,
                    session_owner=self._ticket.tenant.owner,
                    segments=prompt.segments,
                    arrival_ns=arrival_ns,
                    on_start=on_start,
                    queue_timeout_s=services.config.queue_timeout,
                    timeout_s=max(0.0, services.config.request_timeout - spent_s),
                )
            )

    def _named(self, error: Exception) -> Exception:
        """The engine knows a grammar; the client, the field it was in."""
        if isinstance(error, NanoVLLMError) and error.param == "grammar":
            error.param = self._order.grammar_param
        return error

    async def _fail(self, send: Send, error: Exception) -> None:
        """Where events are under way, the failure is the last one."""
        if self._has_started and self._is_stream:
            data = self._course.failed(error_object(error, self._ticket.request_id))
            await self._write(send, data, is_last=True)

    async def _write(self, send: Send, data: bytes, *, is_last: bool) -> None:
        async with self._turn:
            self._sending_s = time.monotonic()
            if not self._has_started:
                self._has_started = True
                await send(self._start(len(data)))
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})
            self._sending_s, self._sent_s = None, time.monotonic()

    def _start(self, length: int) -> Message:
        headers = sse.HEADERS if self._is_stream else [*JSON_HEADERS, (b"content-length", b"%d" % length)]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    async def _watch_time(self, send: Send, scope: anyio.CancelScope) -> None:
        """A comment after each silence; the end for a client that takes nothing."""
        beat_s, stall_s = self._services.config.heartbeat_interval, self._services.config.write_timeout
        while True:
            if self._sending_s is not None:
                wait_s = self._sending_s + stall_s - time.monotonic()
                if wait_s <= 0:
                    scope.cancel()
                    return
            else:
                wait_s = self._sent_s + beat_s - time.monotonic()
                if wait_s <= 0 and self._is_stream:
                    await self._ping(send, stall_s, scope)
            await asyncio.sleep(max(0.001, min(wait_s if wait_s > 0 else beat_s, stall_s)))

    async def _ping(self, send: Send, stall_s: float, scope: anyio.CancelScope) -> None:
        with anyio.move_on_after(stall_s) as limit:
            await self._write(send, sse.PING, is_last=False)
        if limit.cancelled_caught:
            scope.cancel()


async def until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancel the answer when its client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _after(count: int, do: Callable[[], None]) -> Callable[[], None]:
    """A function that does something the `count`-th time it is called."""
    left = [count]

    def step() -> None:
        left[0] -= 1
        if left[0] == 0:
            do()

    return step


def _check_endings(batch: Batch) -> None:
    """Nothing but a full stop or a full length is an answer."""
    for _, deltas in batch:
        for delta in deltas:
            if delta.finish_reason not in (None, *ENDINGS):
                raise ExecutionError(f"The request ended early: {delta.finish_reason}.")
