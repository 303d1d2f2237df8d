"""LLMEngine: the page everybody reads first. A request enters in `add_request`; `step` moves all of them.

What it is: the request path, top to bottom, each stage one line. What it knows
nothing about: how models compute, how blocks are found, who is calling. Invariants:
every admitted sequence ends in exactly one terminal event; after the last one ended
nothing is leased. One thread drives an engine; `post` is the only call for others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from nanovllm.core.digest import root_digest
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.timeline import Timeline
from nanovllm.engine.driver import Driver
from nanovllm.engine.exec_batch import NO_TOKEN, ExecBatch, ExecResult, samples_next
from nanovllm.engine.intake import Prompt, check_labels
from nanovllm.engine.marks import StepMarks
from nanovllm.engine.outputs import RequestOutput, StepOutput
from nanovllm.engine.parts import EngineParts, Progress, RequestArgs
from nanovllm.engine.request_book import RequestBook
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import (
    EngineClosedError,
    ExecutionError,
    InvalidRequestError,
    NanoVLLMError,
    OutOfMemoryError,
    RequestNotFoundError,
)


class LLMEngine:
    """Owns every request from arrival to release."""

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self.scheduler, self.runner, self.intake = parts.scheduler, parts.runner, parts.intake
        self.clock, self.events = parts.clock, parts.events
        self.marks = StepMarks(parts.clock, parts.events)
        self.book = RequestBook(parts.tokenizer)
        self.driver = Driver(self)
        self._ended: list[Sequence] = []  # ended since the last emit
        self._commands: deque[Callable[[], object]] = deque()
        self._num_requests = self._num_seqs = 0
        self._is_closed = False

    # -- in ----------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        namespace: str = "",
        cache_salt: str = "",
        prefill_only: bool = False,
        template_tokens: int | None = None,
        arrival_ns: int | None = None,
    ) -> str:
        """Validate, tokenize, build the `Sequence` and queue it; returns its request_id.

        `template_tokens` is what a chat template added to the prompt, kept for display. Raises
        InvalidRequestError or ContextLengthError; the engine is then as it was before.
        """
        # BEGIN SOLUTION add_request
        arrival_ns = self.clock.now_ns() if arrival_ns is None else arrival_ns
        check_labels(request_id, priority, namespace, cache_salt, prefill_only)
        request_id = self._identify(request_id)
        params = SamplingParams() if sampling_params is None else sampling_params
        self.events.request(request_id, "entered", 0, 0, 0, ts_ns=arrival_ns)
        try:
            token_ids, spans = self.intake.tokenize(prompt)
            self.intake.check(token_ids, params)
        except NanoVLLMError:
            self.events.request(request_id, "rejected", 0, 0, 0)
            raise
        seqs = [self._build(token_ids, params, request_id, index, arrival_ns) for index in range(params.n)]
        for seq in seqs:
            seq.priority, seq.namespace, seq.prefill_only, seq.segments = priority, namespace, prefill_only, spans
            seq.root_digest = root_digest({**self.parts.identity, "namespace": namespace, "salt": cache_salt})
        self._enqueue(request_id, seqs, template_tokens)
        return request_id
        # END SOLUTION

    def resume(self, *states: dict[str, Any], cache_salt: str = "") -> str:
        """Go on with a request that another engine started; returns its request_id.

        `states` are the resume views of its sequences: one, or all n of them. Raises InvalidRequestError
        where one is malformed, complete, or from an engine with another block size.
        """
        seqs = [self._restored(state, cache_salt) for state in states]
        request_ids = {seq.request_id for seq in seqs}
        if len(request_ids) != 1:
            raise InvalidRequestError("The sequences to resume belong to several requests.", param="request_id")
        request_id = self._identify(request_ids.pop())
        self._enqueue(request_id, seqs, None)
        return request_id

    def abort(self, request_id: str) -> bool:
        """End a request now and give its blocks back; False if it is unknown or has ended. Safe to repeat."""
        live = self.book.sequences(request_id)
        for seq in live:
            self._end(seq, SequenceStatus.ABORTED, "abort")
        return bool(live)

    def promote(self, request_id: str) -> None:
        """Let a prefill-only request go on to decode. Raises RequestNotFoundError once it has ended."""
        if request_id not in self.book:
            raise RequestNotFoundError(f"There is no live request {request_id!r}.", param="request_id")
        for seq in self.book.sequences(request_id):
            self.scheduler.promote(seq)

    def post(self, command: Callable[[], object]) -> None:
        """Have `command` called between two steps; may be called from any thread."""
        self._commands.append(command)

    def is_finished(self) -> bool:
        """True when no request is live and nothing waits to be handed over."""
        return self.scheduler.is_finished() and not self._ended and not self._commands

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """One turn of the engine: every running sequence gets its next token, or its next chunk of prefill."""
        # BEGIN SOLUTION step
        self._apply_commands_and_transfers()
        batch = self.scheduler.schedule()  # match, admit, bind
        if not batch:
            return self._emit_idle()
        result = self._run(batch)  # forward and sample
        if result is not None:
            token_ids = self._tokens_by_sequence(batch, result)
            self._commit(batch)  # publish full blocks
            self._ended += self.scheduler.postprocess(batch.seqs, token_ids, finish_check=self.book.finish_check)
        return self._emit(batch.seqs)
        # END SOLUTION

    def generate(self, requests: list[RequestArgs], progress: Progress = iter) -> list[RequestOutput]:
        """Inject a batch of requests and step until each has ended; outputs in the order of `requests`.

        Other callers' requests move on meanwhile and stay theirs. If a request is refused, or the call
        is left by an exception, those of this call are aborted.
        """
        ids: list[str] = []
        try:
            for request in requests:
                ids.append(self.add_request(**request))
            finals = (out.final for out in self.driver.listen(ids) if out.final is not None)
            done = {final.request_id: final for final in progress(finals)}
        finally:
            self.driver.drop(request_id for request_id in ids if request_id in self.book)
        return [done[request_id] for request_id in ids]

    def is_live(self, request_id: str) -> bool:
        """True until the last increment of the request was handed over."""
        return request_id in self.book

    def is_waiting_for_state(self) -> bool:
        """True when nothing can run before a load of state arrives."""
        return bool(self.scheduler.loading) and not self.scheduler.running

    def flush(self) -> list[StepOutput]:
        """Hand over what ended outside a step, such as aborts."""
        return self._emit([])

    def close(self) -> None:
        """Abort what lives and release model and pool; a second call does nothing."""
        if not self._is_closed:
            for request_id in self.book.request_ids:
                self.abort(request_id)
            self.flush()
            self._is_closed = True
            del self.runner, self.parts.runner, self.parts.device_tier

    # -- the steps of a step -----------------------------------------------------------------------

    def _apply_commands_and_transfers(self) -> None:
        if self._is_closed:
            raise EngineClosedError("The engine is closed.", hint="Make a new LLM.")
        while self._commands:
            self._commands.popleft()()
        self.scheduler.apply_transfers(self.scheduler.kv.poll())

    def _run(self, batch: ScheduledBatch) -> ExecResult | None:
        """Execute the batch. Where that fails, its sequences fail, and the engine goes on with the others."""
        self.marks.launch(batch, self.scheduler)
        try:
            result = self.runner.collect(self.runner.launch(ExecBatch.build(batch.seqs)))
        except Exception as error:  # noqa: BLE001  whatever it raises fails these requests only
            failure = ExecutionError(f"The step failed: {type(error).__name__}: {error}.")
            failure.__cause__ = error
            for seq in batch.seqs:
                self._fail(seq, failure)
            return None
        except BaseException:  # an interrupt: nothing of this step counts, the next one computes it again
            for seq in batch.seqs:
                seq.num_scheduled_tokens = 0
            raise
        self.marks.collected(batch)
        return result

    def _tokens_by_sequence(self, batch: ScheduledBatch, result: ExecResult) -> list[int | None]:
        """One sampled token per sequence, None for those with prompt tokens left; their log-probabilities are kept.

        A sequence for which the model computed no number fails alone: it leaves the batch.
        """
        rows = iter(zip(result.token_ids.tolist(), result.logprobs, strict=True))
        tokens: dict[Sequence, int | None] = {}
        for seq in batch.seqs:
            token_id, logprobs = next(rows) if samples_next(seq) else (None, None)
            if token_id == NO_TOKEN:
                self._fail(seq, ExecutionError("The model's logits for this request are not finite."))
                continue
            if logprobs is not None:
                self.book.add_logprobs(seq, logprobs)
            tokens[seq] = token_id
        batch.seqs = list(tokens)
        return list(tokens.values())

    def _commit(self, batch: ScheduledBatch) -> None:
        for seq in batch.seqs:
            self.scheduler.kv.commit(seq, seq.num_scheduled_tokens)

    def _emit(self, seqs: list[Sequence]) -> list[StepOutput]:
        """Hand over what is new of the sequences that ran, and of those that ended beside them."""
        ended, self._ended = self._ended, []
        outputs = []
        for seq in [*(s for s in seqs if not s.is_finished), *ended]:
            self.marks.handed_over(seq)
            output = self.book.take(seq)
            if output is not None:
                outputs.append(output)
        self.driver.deliver(outputs)
        return outputs

    def _emit_idle(self) -> list[StepOutput]:
        """Nothing could run: hand over what ended meanwhile; a head that nobody will ever make room for fails."""
        scheduler = self.scheduler
        if scheduler.waiting and not scheduler.running and not scheduler.loading and scheduler.kv.is_settled():
            seq = scheduler.waiting[0]
            self._fail(seq, OutOfMemoryError("Pinned state leaves no room for the request."))
        return self._emit([])

    # -- bookkeeping -------------------------------------------------------------------------------

    def _identify(self, request_id: str | None) -> str:
        if self._is_closed:
            raise EngineClosedError("The engine is closed.", hint="Make a new LLM.")
        if request_id is None:
            self._num_requests += 1
            own = f"req-{self._num_requests}"
            return own if own not in self.book else self._identify(None)
        if request_id in self.book:
            raise InvalidRequestError(f"request_id {request_id!r} is in use.", param="request_id")
        return request_id

    def _build(
        self, token_ids: list[int], params: SamplingParams, request_id: str, index: int, arrival_ns: int
    ) -> Sequence:
        seed = params.seed if params.seed is not None else self.parts.seed + (self._num_seqs << 8)
        seq = Sequence(
            token_ids, params, self.scheduler.block_size, request_id, index=index, seed=(seed + index) % 2**64
        )
        self._adopt(seq, arrival_ns)
        return seq

    def _restored(self, state: dict[str, Any], cache_salt: str) -> Sequence:
        seq = Sequence.__new__(Sequence)
        seq.__setstate__(state)
        self.intake.check(self.intake.tokenize(seq.token_ids)[0], seq.sampling_params)
        if seq.block_size != self.scheduler.block_size:
            raise InvalidRequestError("The sequence comes from an engine with another block_size.", param="block_size")
        self._adopt(seq, self.clock.now_ns())
        if not 0 < seq.num_prompt_tokens <= seq.num_tokens < seq.max_total_tokens:
            raise InvalidRequestError("The sequence is complete, or its counts disagree.", param="num_prompt_tokens")
        seq.root_digest = root_digest({**self.parts.identity, "namespace": seq.namespace, "salt": cache_salt})
        return seq

    def _adopt(self, seq: Sequence, arrival_ns: int) -> None:
        """Give a sequence what belongs to this engine rather than to the request."""
        self._num_seqs += 1
        params = seq.sampling_params
        limit = self.intake.max_model_len
        seq.seq_id = self._num_seqs
        seq.max_total_tokens = min(seq.num_prompt_tokens + (params.max_tokens or limit), limit)
        seq.eos_token_ids = () if params.ignore_eos else self.parts.eos_token_ids
        seq.timeline = Timeline(arrival_ns, label=self.parts.label)

    def _enqueue(self, request_id: str, seqs: list[Sequence], template_tokens: int | None) -> None:
        self.book.open(request_id, seqs, template_tokens)
        for seq in seqs:
            seq.timeline.queued_ns = self.clock.now_ns()
            self.scheduler.add(seq)

    def _fail(self, seq: Sequence, error: NanoVLLMError) -> None:
        self.book.note_failure(seq, error)
        self._end(seq, SequenceStatus.FAILED, "error")

    def _end(self, seq: Sequence, status: SequenceStatus, reason: str) -> None:
        self.scheduler.end(seq, status)
        seq.finish_reason = reason
        self._ended.append(seq)
