"""AsyncEngine: the engine for callers that live on an event loop.

What it is: submit, stream, abort, drain. It owns the link to an engine in a thread or a
child process, and a `RequestStream` per live request. What it knows nothing about:
HTTP, tenants, text templates. Invariants: everything here runs on one event loop; the
engine wakes it once a step; a stream ends exactly once, in its last delta or in an error;
a stream that is closed early costs its request at most two more steps.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, Literal

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import SegmentSpan
from nanovllm.engine.intake import Intake
from nanovllm.engine.links import Link, ProcessLink, ThreadLink
from nanovllm.engine.messages import (
    Abort,
    Died,
    EngineInfo,
    EngineStats,
    FromEngine,
    Ready,
    StateAnswer,
    StateView,
    StepReport,
    Submit,
    Watch,
    params_to_wire,
)
from nanovllm.engine.request_stream import RequestStream
from nanovllm.engine.state_calls import call_of, result_of
from nanovllm.errors import DrainingError, NanoVLLMError, UnhealthyError
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.models.loading import load_model_files

logger = logging.getLogger("nanovllm")

State = Literal["loading", "ready", "draining", "unhealthy", "dead"]
CLOSE_S = 10.0
MAX_RESTARTS, RESTART_S = 5, 1.0  # of a child process; each waits twice as long as the one before
STEADY_S = 300.0  # a child that lived so long ended for a reason of its own: the count begins anew


class AsyncEngine:
    """One engine, many streams. Make it, `await start()`, submit; `await close()` at the end."""

    info: EngineInfo
    tokenizer: ChatTokenizer
    intake: Intake

    def __init__(self, config: EngineConfig, *, in_process_of_its_own: bool = False) -> None:
        self.config = config
        self.stats = EngineStats()
        self.state: State = "loading"
        self.listeners: list[Callable[[StepReport], None]] = []  # called with each report: metrics
        self.viewers: list[Callable[[StateView], None]] = []  # called with each view, while `watch` asks for them
        self.link: Link = ProcessLink() if in_process_of_its_own else ThreadLink()
        self._streams: dict[str, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[StateAnswer]] = {}
        self._num_calls = 0
        self._ready: asyncio.Future[None] | None = None
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._heard_s = time.monotonic()
        self._watch_s = 0.0
        self._restarts = 0
        self._ready_s = 0.0  # when the engine was ready, the last time
        self._restarting: asyncio.Task[None] | None = None
        self._is_closing = False

    # -- its life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model. Raises what loading raises."""
        loop = asyncio.get_running_loop()
        tokenizer = loop.run_in_executor(None, _load_tokenizer, self.config)  # beside the engine's own loading
        try:
            await self._open()
        finally:
            self.tokenizer = await tokenizer
        self.intake = Intake(self.tokenizer, self.info.vocab_size, self.info.max_model_len)

    def drain(self) -> None:
        """Take no more requests; those that live go on."""
        if self.state in ("ready", "loading"):
            self.state = "draining"

    async def drained(self, timeout_s: float) -> bool:
        """Wait for the live requests; whatever lives after `timeout_s` fails. True where none had to."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            self._fail_all(DrainingError("The server is shutting down."))
            return False
        return True

    async def close(self) -> None:
        """Fail what lives and end the engine. Safe to repeat."""
        self._is_closing = True
        if self._restarting is not None:
            self._restarting.cancel()
        self._fail_all(DrainingError("The server is shutting down."))
        if not await self.link.close(CLOSE_S):
            logger.warning("The engine did not stop within %.0f s.", CLOSE_S)
            self.link.kill()
        self.state = "dead"

    def kill(self) -> None:
        """End at once; for a second signal."""
        self._is_closing = True
        self.link.kill()

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine's loop last said something."""
        return time.monotonic() - self._heard_s

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def watch(self, period_s: float) -> None:
        """Have the viewers told every `period_s` what the engine holds; 0: never. It outlives a restart."""
        self._watch_s = period_s
        if self.state not in ("loading", "dead"):
            self.link.send(Watch(period_s))

    async def call_state(self, verb: str, **arguments: Any) -> Any:
        """A call on the engine's `StateStore`, run between two of its steps: `await call_state("pin", state_id=...)`.

        Returns and raises what the store does. Raises UnhealthyError where the engine ends before it answers.
        """
        if self.state != "draining":  # what still runs may still keep its state
            self._check_state()
        self._num_calls += 1
        call = call_of(self._num_calls, verb, arguments)
        self._calls[call.call_id] = answered = asyncio.get_running_loop().create_future()
        try:
            self.link.send(call)
            return result_of(await answered, verb)
        finally:
            del self._calls[call.call_id]

    # -- requests ----------------------------------------------------------------------------------

    def submit(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        namespace: str = "",
        cache_salt: str = "",
        priority: int = 0,
        template_tokens: int | None = None,
        arrival_ns: int | None = None,
        segments: tuple[SegmentSpan, ...] = (),
        prefill_only: bool = False,
        session_id: str = "",
        session_owner: str = "",
        on_start: Callable[[], None] | None = None,
        queue_timeout_s: float | None = None,
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Queue a request. Raises InvalidRequestError, or DrainingError and UnhealthyError where none are taken.

        `segments` name the parts of the prompt, and cover it. A `prefill_only` request leaves its KV, no token.
        `session_id` is a hint which state is wanted again; it changes no token. `session_owner`: the namespace that
        this session is of, where that is not `namespace`.
        `on_start` is called when its first step has run. The stream fails with BusyError where that has not
        happened after `queue_timeout_s`, and with DeadlineError where it has not ended after `timeout_s`.
        """
        self._check_state()
        self.intake.check(token_ids, params)
        request_id = f"req-{secrets.token_hex(8)}"  # made here: an id that a client chose could name another's
        stream = RequestStream(request_id, self._forget, on_start)
        self._streams[request_id] = stream
        self._is_empty.clear()
        stream.set_deadlines(queue_timeout_s, timeout_s)
        labels = (namespace, cache_salt, priority, template_tokens, arrival_ns, segments, prefill_only)
        self.link.send(
            Submit(request_id, token_ids, params_to_wire(params), *labels, session_id, session_owner),
        )
        return stream

    def _check_state(self) -> None:
        if self.state in ("unhealthy", "dead"):
            raise UnhealthyError("The engine has failed.", hint="Restart the server.")
        if self.state != "ready":
            doing = "still loading its model" if self.state == "loading" else "shutting down"
            raise DrainingError(f"The server is {doing}.", hint="Try again, or another server.")

    def _forget(self, request_id: str, abort: bool) -> None:
        """A stream has ended; by itself, or because nobody listens any more."""
        self._streams.pop(request_id, None)
        if abort:
            self.link.send(Abort(request_id))
        if not self._streams:
            self._is_empty.set()

    def _fail_all(self, error: NanoVLLMError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)

    # -- what the engine says ----------------------------------------------------------------------

    async def _open(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        await self.link.open(self.config, self._hear, self._ended)
        await self._ready

    def _hear(self, message: FromEngine) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, StepReport):
            self.stats = message.stats
            self._deliver(message)
        elif isinstance(message, Ready):
            self.info, self._ready_s = message.info, time.monotonic()
            self.state = "ready" if self.state == "loading" else self.state
            self._settle(None)
            if self._watch_s:
                self.watch(self._watch_s)
        elif isinstance(message, StateAnswer):
            call = self._calls.get(message.call_id)
            if call is not None and not call.done():
                call.set_result(message)
        elif isinstance(message, StateView):
            self.stats = message.stats
            for viewer in self.viewers:
                viewer(message)
        elif isinstance(message, Died):
            self._failed(message.error.as_error())
        else:
            self.stats = message.stats

    def _deliver(self, report: StepReport) -> None:
        """To each stream what is its own; requests that nobody waits for any more are passed over."""
        streams = self._streams
        for request_id in report.started:
            if request_id in streams:
                streams[request_id].started()
        for delta in report.deltas:
            if delta.request_id in streams:
                streams[delta.request_id].push(delta)
        for finished in report.finished:
            if finished.request_id in streams:
                streams[finished.request_id].finish(finished)
        for listener in self.listeners:
            listener(report)

    def _failed(self, error: NanoVLLMError) -> None:
        """The engine says that it cannot start, or that it takes no more."""
        if not self._settle(error):
            self._fail_all(error)
            self.state = "unhealthy"

    def _ended(self) -> None:
        """The engine is gone: its thread ended, or its process."""
        self.stats = EngineStats()  # it holds nothing any more, and its successor counts from 0
        error = UnhealthyError("The engine has ended.", hint="See the log.")
        if self._is_closing or self._settle(error):
            return
        self._fail_all(error)
        if time.monotonic() - self._ready_s > STEADY_S:
            self._restarts = 0
        if self.link.can_restart and self._restarts < MAX_RESTARTS and self.state != "draining":
            self.state = "loading"
            self._restarting = asyncio.get_running_loop().create_task(self._restart())
        else:
            self.state = "dead"

    async def _restart(self) -> None:
        """Another child in place of the one that ended."""
        await asyncio.sleep(RESTART_S * 2**self._restarts)
        self._restarts += 1
        logger.warning("The engine has ended; starting it again (%d of %d).", self._restarts, MAX_RESTARTS)
        try:
            await self._open()
        except NanoVLLMError as error:
            logger.error("The engine did not start again: %s", error)

    def _settle(self, error: NanoVLLMError | None) -> bool:
        """Answer whoever waits for the start; False where nobody does."""
        if self._ready is None or self._ready.done():
            return False
        if error is None:
            self._ready.set_result(None)
        else:
            self.state = "dead"
            self._ready.set_exception(error)
        return True


def _load_tokenizer(config: EngineConfig) -> ChatTokenizer:
    loaded = load_model_files(config.model, progress=False, seed=config.seed)
    loaded.weights.close()
    return loaded.tokenizer
