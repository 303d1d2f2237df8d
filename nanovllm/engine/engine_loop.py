"""EngineLoop: one engine, stepped in a thread or process of its own, spoken to in messages.

What it is: the loop that takes messages, steps the engine and sends one report a step.
What it knows nothing about: who is at the other end, event loops, HTTP. Invariants:
every submitted request is answered by exactly one `Finished`; the loop says something
at least once a second while steps are shorter than that; an exception never leaves it.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.driver import IDLE_S
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import (
    Abort,
    Died,
    EngineInfo,
    EngineStats,
    ErrorInfo,
    Finished,
    FromEngine,
    Heartbeat,
    StateAnswer,
    StateCall,
    StepReport,
    Stop,
    Submit,
    ToEngine,
    Watch,
    delta_of,
    finished_of,
    params_from_wire,
    prompt_of,
)
from nanovllm.engine.outputs import StepOutput
from nanovllm.engine.prefill_rate import PrefillRate
from nanovllm.engine.state_calls import apply_engine_call
from nanovllm.engine.state_count import count_totals
from nanovllm.engine.watch import StateWatch
from nanovllm.errors import ExecutionError, InvalidRequestError, NanoVLLMError, UnhealthyError

logger = logging.getLogger("nanovllm")

HEARTBEAT_S = 1.0
TIERS_S = 0.1  # between two looks at the tiers: steps are many
MAX_BAD_STEPS = 3


@dataclass(frozen=True)
class Compiled:
    """A submitted request's grammar is compiled, or refused: said by a worker thread to the loop."""

    message: Submit
    error: BaseException | None


Inbox = queue.SimpleQueue[ToEngine | Compiled]
Send = Callable[[FromEngine], None]


class EngineLoop:
    """Runs until it is told to stop."""

    def __init__(self, engine: LLMEngine, inbox: Inbox, send: Send) -> None:
        self.engine, self._inbox, self._send = engine, inbox, send
        self._watch = StateWatch(engine)
        self._queued: set[str] = set()  # submitted, and not run yet
        self._compiling: dict[str, Submit] = {}  # their grammar is being compiled elsewhere
        self._refused: list[Finished] = []  # ended without having entered the engine
        self._prefill_rate = PrefillRate()
        self._bad_turns = 0
        self._is_unhealthy = False
        self._last_beat_s = self._tiers_s = 0.0
        self._tiers: dict[str, dict[str, Any]] = {}
        self._num_blocks = engine.scheduler.kv.num_free_blocks  # nothing is leased yet

    def run(self) -> None:
        """Take messages and step until `Stop`; then abort what lives and close the engine."""
        while self._take_messages():
            outputs = self._turn()
            self._report(outputs)
            if self._watch.is_due():
                self._show()
            if not outputs and (self.engine.is_waiting_for_state() or self._only_transfers()):
                time.sleep(IDLE_S)
        self.engine.close()

    # -- in ----------------------------------------------------------------------------------------

    def _take_messages(self) -> bool:
        """Act on every message there is; where there is nothing to do, wait for one. False: the end."""
        is_idle = self.engine.is_finished() and self.engine.scheduler.kv.is_settled() and not self._refused
        try:
            sleep_s = self._watch.due_in_s(HEARTBEAT_S) if is_idle else 0.0
            message = self._inbox.get(timeout=sleep_s) if sleep_s else self._inbox.get_nowait()
            while True:
                if isinstance(message, Stop):
                    return False
                self._take(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _take(self, message: Submit | Abort | Watch | StateCall | Compiled) -> None:
        if isinstance(message, Abort):
            self._abort(message.request_id)
            return
        if isinstance(message, Watch):
            self._watch.set(message.period_s)
            return
        if isinstance(message, StateCall):
            self._call_state(message)
            return
        submit = message.message if isinstance(message, Compiled) else message
        try:
            if isinstance(message, Compiled):
                self._go_on(message)
            else:
                self._submit(message)
        except NanoVLLMError as error:
            self._refuse(submit.request_id, error)
        except Exception as error:  # whatever it is, it is this request's
            logger.exception("A request could not enter the engine.")
            self._refuse(submit.request_id, ExecutionError(f"The request failed: {type(error).__name__}."))

    def _submit(self, message: Submit) -> None:
        """Enter the engine; a request with a grammar enters when that is compiled, and stalls nobody meanwhile."""
        if self._is_unhealthy:
            raise UnhealthyError("The engine failed several times in a row.", hint="Restart the server.")
        params = params_from_wire(message.params)
        if params.grammar is None:
            self._enter(message, params)
            return
        self._compiling[message.request_id] = message
        compiling = self.engine.parts.grammars.prepare(params.grammar, message.namespace)
        compiling.add_done_callback(lambda done: self._inbox.put(Compiled(message, done.exception())))

    def _go_on(self, compiled: Compiled) -> None:
        if self._compiling.pop(compiled.message.request_id, None) is None:
            return  # aborted meanwhile
        if compiled.error is not None:
            raise compiled.error
        self._enter(compiled.message, params_from_wire(compiled.message.params))

    def _enter(self, message: Submit, params: SamplingParams) -> None:
        self.engine.add_request(
            prompt_of(message),
            params,
            request_id=message.request_id,
            namespace=message.namespace,
            cache_salt=message.cache_salt,
            session_id=message.session_id,
            session_owner=message.session_owner,
            priority=message.priority,
            template_tokens=message.template_tokens,
            arrival_ns=message.arrival_ns,
            prefill_only=message.prefill_only,
        )
        self._queued.add(message.request_id)

    def _abort(self, request_id: str) -> None:
        if self._compiling.pop(request_id, None) is not None:
            self._refused.append(Finished(request_id, finish_reasons=["abort"]))
        self.engine.abort(request_id)

    def _call_state(self, call: StateCall) -> None:
        state = self.engine.parts.state
        if state is None:
            error = InvalidRequestError("This engine has no state plane.", param="verb")
            self._send(StateAnswer(call.call_id, error=ErrorInfo.of(error)))
        else:
            apply_engine_call(state, call, self._send)

    def _refuse(self, request_id: str, error: NanoVLLMError) -> None:
        self._compiling.pop(request_id, None)
        self._refused.append(Finished(request_id, error=ErrorInfo.of(error)))

    # -- one turn ----------------------------------------------------------------------------------

    def _turn(self) -> list[StepOutput]:
        """One step if there is work. What even the engine did not catch counts as a bad step."""
        if self.engine.is_finished() and not self._only_transfers():
            self._pass_time()
            return []
        marks, start_s = self.engine.marks, time.perf_counter()
        prefilled, decoded = marks.num_prefill_tokens, marks.num_decode_tokens
        try:
            outputs = self.engine.step()
            self._bad_turns = 0
        except Exception:
            logger.exception("A step failed.")
            self._bad_turns += 1
            outputs = []
        spent_s = time.perf_counter() - start_s
        self._prefill_rate.note(marks.num_prefill_tokens - prefilled, marks.num_decode_tokens - decoded, spent_s)
        if max(self._bad_turns, self.engine.bad_steps_in_a_row) >= MAX_BAD_STEPS and not self._is_unhealthy:
            outputs = [*outputs, *self._give_up()]
        return outputs

    def _only_transfers(self) -> bool:
        """No request lives, and bytes are still on their way for those that did: their leases end when they arrive."""
        return self.engine.is_finished() and not self.engine.scheduler.kv.is_settled()

    def _pass_time(self) -> None:
        """Nothing to step: what time alone brings to state, such as the end of a pin."""
        if self.engine.parts.state is not None:
            self.engine.parts.state.rest()

    def _give_up(self) -> list[StepOutput]:
        """Too many bad steps: everything that lives fails, and nothing new enters."""
        self._is_unhealthy = True
        error = UnhealthyError(f"{MAX_BAD_STEPS} steps failed in a row.", hint="See the log, restart the server.")
        self._send(Died(ErrorInfo.of(error)))
        for request_id in self.engine.book.request_ids:
            self.engine.abort(request_id)
        return self.engine.flush()

    # -- out ---------------------------------------------------------------------------------------

    def _report(self, outputs: list[StepOutput]) -> None:
        """One message for the whole step; a heartbeat now and then where there is nothing to say."""
        finals = [output.final for output in outputs if output.final is not None]
        finished = [*self._refused, *map(finished_of, finals)]
        started = self._newly_started()
        self._refused = []
        self._queued.difference_update(final.request_id for final in finals)
        if not (outputs or finished or started):
            if time.monotonic() - self._last_beat_s >= HEARTBEAT_S / 2:
                self._say(Heartbeat(self.stats()))
            return
        self._say(StepReport(self.stats(), list(map(delta_of, outputs)), finished, started))

    def _say(self, message: FromEngine) -> None:
        self._last_beat_s = time.monotonic()
        self._send(message)

    def _show(self) -> None:
        """Say what the engine holds. A picture that cannot be made harms nobody: there are no more of them."""
        try:
            self._send(self._watch.view(self.stats(), self._compiling.values()))
        except Exception:
            logger.exception("The state could not be shown.")
            self._watch.set(0)

    def _newly_started(self) -> list[str]:
        """Requests that were queued and have run since."""
        started = [r for r in self._queued if any(s.timeline.launch_ns for s in self.engine.book.sequences(r))]
        self._queued.difference_update(started)
        return started

    def info(self, config: EngineConfig) -> EngineInfo:
        """What was decided at start."""
        intake, tier = self.engine.intake, self.engine.parts.device_tier
        return EngineInfo(
            model=config.model,
            vocab_size=intake.vocab_size,
            max_model_len=intake.max_model_len,
            block_size=self.engine.scheduler.block_size,
            num_blocks=self._num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_mode=config.prefix_mode,
            dtype="" if tier is None else str(tier.pool.dtype).removeprefix("torch."),
            device="" if tier is None else tier.pool.device.type,
            label=self.engine.parts.label,
            block_bytes=0 if tier is None else tier.block_bytes,
        )

    def _tier_facts(self) -> dict[str, dict[str, Any]]:
        state, now_s = self.engine.parts.state, time.monotonic()
        if state is not None and now_s - self._tiers_s >= TIERS_S:
            self._tiers, self._tiers_s = state.store.top()["tiers"], now_s
        return self._tiers

    def stats(self) -> EngineStats:
        """The engine in numbers, as of now."""
        scheduler, marks = self.engine.scheduler, self.engine.marks
        live, prefilling, entries = count_totals([*scheduler.running, *scheduler.loading])
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._compiling),
            loading=len(scheduler.loading),
            num_blocks=self._num_blocks,
            free_blocks=scheduler.kv.num_free_blocks,
            cached_blocks=scheduler.kv.num_cached_blocks,
            live_requests=live,
            prefilling_requests=prefilling,
            table_entries=entries,
            steps=marks.num_steps,
            bad_steps_in_a_row=max(self._bad_turns, self.engine.bad_steps_in_a_row),
            preemptions=scheduler.num_preemptions,
            prefill_tokens=marks.num_prefill_tokens,
            decode_tokens=marks.num_decode_tokens,
            prefill_tokens_per_s=self._prefill_rate.tokens_per_s,
            events_dropped=self.engine.events.dropped,
            state={} if self.engine.parts.state is None else self.engine.parts.state.facts(),
            tiers=self._tier_facts(),
        )
