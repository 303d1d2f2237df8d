"""LLMEngine: the page everybody reads first. A request enters in `add_request`; `step` moves all of them.

What it is: the request path, top to bottom, each stage one line. What it knows
nothing about: how models compute, how blocks are found, who is calling. Invariants:
every admitted sequence ends in exactly one terminal event; after the last one ended
nothing is leased; an exception fails the request on whose behalf it was raised and no
other. One thread drives an engine; `post` is the only call for others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.driver import Driver
from nanovllm.engine.endings import Endings
from nanovllm.engine.exec_batch import NO_TOKEN, ExecBatch, ExecResult, samples_next
from nanovllm.engine.faults import SequenceFault, failure
from nanovllm.engine.intake import Prompt, check_labels
from nanovllm.engine.kv_state import TransferReport
from nanovllm.engine.marks import StepMarks
from nanovllm.engine.observers import Observers
from nanovllm.engine.outputs import RequestOutput, StepOutput
from nanovllm.engine.parts import EngineParts, Progress, RequestArgs
from nanovllm.engine.request_book import RequestBook
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.sequence_factory import SequenceFactory
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
        self.observers = Observers()
        self.book = RequestBook(parts.tokenizer)
        self.driver = Driver(self)
        self.endings = Endings(parts.scheduler, self.book)
        self.health = self.endings.health
        self._sequences = SequenceFactory(parts)
        self._commands: deque[Callable[[], object]] = deque()
        self._num_requests = 0
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
        session_id: str = "",
        session_owner: str = "",
        prefill_only: bool = False,
        template_tokens: int | None = None,
        arrival_ns: int | None = None,
    ) -> str:
        """Validate, tokenize, build the `Sequence` and queue it; returns its request_id.

        `template_tokens` is what a chat template added to the prompt, kept for display. `session_id`: a hint which
        state will be wanted again, of `session_owner`'s namespace where that is not `namespace`; it changes no token.
        Raises InvalidRequestError or ContextLengthError; the engine is then as it was before.
        """
        # BEGIN SOLUTION add_request
        arrival_ns = self.clock.now_ns() if arrival_ns is None else arrival_ns
        check_labels(request_id, priority, namespace, cache_salt, session_id, session_owner, prefill_only)
        request_id = self._identify(request_id)
        params = SamplingParams() if sampling_params is None else sampling_params
        self.events.request(request_id, "entered", 0, 0, 0, ts_ns=arrival_ns)
        try:
            token_ids, segments = self.intake.tokenize(prompt)
            self.intake.check(token_ids, params)
            labels = {"namespace": namespace, "cache_salt": cache_salt, "prefill_only": prefill_only}
            shape = {"priority": priority, "segments": segments}
            shape |= {"session_id": session_id, "session_owner": session_owner}
            seqs = self._sequences.new(token_ids, params, request_id, arrival_ns, **labels, **shape)
            self._enqueue(request_id, seqs, template_tokens)
        except Exception as error:
            self.events.request(request_id, "rejected", 0, 0, 0)
            if isinstance(error, NanoVLLMError):
                raise
            raise failure("intake", error) from error
        return request_id
        # END SOLUTION

    def resume(self, *states: dict[str, Any], cache_salt: str = "") -> str:
        """Go on with a request that another engine started; returns its request_id.

        `states` are the resume views of its sequences: one, or all n of them. Raises InvalidRequestError
        where one is malformed, complete, or from an engine with another block size.
        """
        seqs = [self._sequences.restored(state, cache_salt) for state in states]
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
            self.endings.end(seq, SequenceStatus.ABORTED, "abort")
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

    @property
    def bad_steps_in_a_row(self) -> int:
        """Steps since the last good one whose whole batch failed, or in which an exception had no owner."""
        return self.health.bad_steps_in_a_row

    def is_finished(self) -> bool:
        """True when no request is live and nothing waits to be handed over."""
        return self.scheduler.is_finished() and not self.endings.ended and not self._commands

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """One turn of the engine: every running sequence gets its next token, or its next chunk of prefill."""
        # BEGIN SOLUTION step
        self._apply_commands_and_transfers()
        batch = self._schedule()  # match, admit, bind
        if not batch:
            return self._emit_idle()
        result = self._run(batch)  # forward and sample
        if result is not None:
            token_ids = self._tokens_by_sequence(batch, result)
            self._commit(batch)  # publish full blocks
            self._postprocess(batch, token_ids)  # append, detokenise, end
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
            self.parts.grammars.close()
            state, self.parts.state = self.parts.state, None
            if state is not None:
                state.close()
            del self.runner, self.parts.runner, self.parts.device_tier

    # -- the steps of a step -----------------------------------------------------------------------

    def _apply_commands_and_transfers(self) -> None:
        """What came from outside since the last step: each command and each report by itself."""
        if self._is_closed:
            raise EngineClosedError("The engine is closed.", hint="Make a new LLM.")
        self.health.begin()
        while self._commands:
            with self.endings.on_nobodys_behalf("command"):
                self._commands.popleft()()
        reports: list[TransferReport] = []
        with self.endings.on_nobodys_behalf("poll"):
            reports = self.scheduler.kv.poll()

        def apply(seq: Sequence) -> None:
            self.scheduler.apply_transfers([report for report in reports if report.seq is seq])

        self.endings.each(dict.fromkeys(report.seq for report in reports), "load", apply)

    def _schedule(self) -> ScheduledBatch:
        """The next batch, and what its grammars allow. Who makes that fail is failed, and it is made without them."""
        while True:
            try:
                batch = self.scheduler.schedule()
                batch.sampling = list(filter(samples_next, batch.seqs))
                batch.masks = self.book.masks(batch.sampling)
                return batch
            except SequenceFault as fault:
                self.scheduler.unschedule()
                self.endings.blame(fault)
            except Exception as error:  # noqa: BLE001  nobody is to blame: nothing is lost, the next step tries again
                self.scheduler.unschedule()
                self.health.note_bad("schedule", error)
                return ScheduledBatch()

    def _run(self, batch: ScheduledBatch) -> ExecResult | None:
        """Execute the batch. Where that fails, its sequences fail, and the engine goes on with the others."""
        stage = "forward"
        try:
            self.marks.launch(batch, self.scheduler)
            handle = self.runner.launch(ExecBatch.build(batch.seqs, batch.masks))
            stage = "sample"
            result = self.runner.collect(handle)
            result.check(len(batch.sampling))
            self.marks.collected(batch)
        except Exception as error:  # noqa: BLE001  whatever it raises fails these requests only
            failed = self.health.note_bad(stage, error)
            for seq in batch.seqs:
                self.endings.fail(seq, failed)
            return None
        except BaseException:  # an interrupt: nothing of this step counts, the next one computes it again
            self.scheduler.unschedule()
            raise
        self.health.note_ran()
        return result

    def _tokens_by_sequence(self, batch: ScheduledBatch, result: ExecResult) -> dict[Sequence, int | None]:
        """One sampled token per sequence, None for those with prompt tokens left; their log-probabilities are kept.

        A sequence for which the model computed no number fails alone.
        """
        rows = zip(batch.sampling, result.token_ids.tolist(), result.logprobs, strict=True)
        tokens: dict[Sequence, int | None] = dict.fromkeys(batch.seqs)

        def take_in(seq: Sequence) -> None:
            _, token_id, logprobs = next(rows)
            if token_id == NO_TOKEN:
                raise ExecutionError("The model's logits for this request are not finite.")
            if logprobs is not None:
                self.book.add_logprobs(seq, logprobs)
            tokens[seq] = token_id

        self.endings.each(batch.sampling, "sample", take_in)
        return tokens

    def _commit(self, batch: ScheduledBatch) -> None:
        commit = self.scheduler.kv.commit
        self.endings.each(self._unfailed(batch), "commit", lambda seq: commit(seq, seq.num_scheduled_tokens))

    def _postprocess(self, batch: ScheduledBatch, token_ids: dict[Sequence, int | None]) -> None:
        check, ended = self.book.finish_check, self.endings.ended

        def append(seq: Sequence) -> None:
            ended.extend(self.scheduler.postprocess([seq], [token_ids[seq]], finish_check=check))

        self.endings.each(self._unfailed(batch), "detokenise", append)

    def _emit(self, seqs: list[Sequence]) -> list[StepOutput]:
        """Hand over what is new of the sequences that ran, and of those that ended beside them."""
        ended = self.endings.take()
        handed_over = [self._hand_over(seq) for seq in [*(s for s in seqs if not s.is_finished), *ended]]
        outputs = [output for output in handed_over if output is not None]
        self.driver.deliver(outputs)
        return outputs

    def _hand_over(self, seq: Sequence) -> StepOutput | None:
        """What is new of `seq`. Where that cannot be told its request ends, with what was told before."""
        try:
            output = self.book.take(seq)
        except Exception as error:  # noqa: BLE001  whatever it raises fails this request only
            self.endings.stop(seq, SequenceStatus.FAILED, "error")
            output = self.book.give_up(seq, failure("emit", error))
        try:
            self.marks.handed_over(seq)
        except Exception as error:  # noqa: BLE001  a record that cannot be kept harms no request
            self.health.note_bad("marks", error)
        self.observers.handed_over(seq)
        return output

    def _emit_idle(self) -> list[StepOutput]:
        """Nothing could run: hand over what ended meanwhile; a head that nobody will ever make room for fails."""
        scheduler = self.scheduler
        is_stuck = scheduler.waiting and not scheduler.running and not scheduler.loading and scheduler.kv.is_settled()
        if is_stuck and not self.health.is_bad:
            self.endings.fail(scheduler.waiting[0], OutOfMemoryError("Pinned state leaves no room for the request."))
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

    def _enqueue(self, request_id: str, seqs: list[Sequence], template_tokens: int | None) -> None:
        """Into the book and the queue, or, where one of them refuses, into neither."""
        wanted = [(seq, seq.sampling_params.grammar) for seq in seqs]
        compiled = self.parts.grammars.compiled
        grammars = {seq: compiled(grammar, seq.namespace) for seq, grammar in wanted if grammar is not None}
        self.book.open(request_id, seqs, template_tokens, grammars)
        try:
            for seq in seqs:
                seq.timeline.queued_ns = self.clock.now_ns()
                self.scheduler.add(seq)
        except BaseException:
            self.book.forget(request_id)
            for seq in seqs:
                self.scheduler.end(seq, SequenceStatus.FAILED)
            raise
        self.observers.entered(seqs)

    def _unfailed(self, batch: ScheduledBatch) -> list[Sequence]:
        return [seq for seq in batch.seqs if not seq.is_finished]
