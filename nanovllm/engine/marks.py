"""Marks: what a step did, told to the timelines and to the event bus.

What it is: the one place where the request's life is written down while it happens.
What it knows nothing about: who reads it. Timelines are kept here synchronously;
the bus gets the same moments and may drop them.
"""

from __future__ import annotations

from nanovllm.core.clock import Clock
from nanovllm.core.events import EventBus
from nanovllm.core.timeline import Run
from nanovllm.engine.block_log import BlockTimes
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.step_costs import StepCosts

ENDS = {SequenceStatus.ABORTED: "aborted", SequenceStatus.FAILED: "failed"}


class StepMarks:
    """Writes one engine's steps down."""

    def __init__(self, clock: Clock, events: EventBus) -> None:
        self.clock, self.events = clock, events
        self.num_steps = self.num_prefill_tokens = self.num_decode_tokens = 0
        self.block_times: BlockTimes | None = None  # set where the time in block calls is measured
        self.costs: StepCosts | None = None  # set where somebody decides by what computing costs
        self._launch_ns = 0

    def launch(self, batch: ScheduledBatch, scheduler: Scheduler) -> None:
        """A step is about to run."""
        self._launch_ns = self.clock.now_ns()
        self.num_steps += 1
        decodes = batch.num_decodes
        self.num_prefill_tokens += batch.num_tokens - decodes
        self.num_decode_tokens += decodes
        self.events.step(
            self.num_steps,
            len(batch),
            len(scheduler.running),
            len(scheduler.waiting),
            batch.num_tokens - decodes,
            decodes,
            scheduler.kv.num_free_blocks,
            scheduler.kv.num_cached_blocks,
            batch.scheduled_ns,
            self._launch_ns,
            None if self.block_times is None else self.block_times.take(),
        )
        for seq in batch.prefills:
            if seq.timeline.launch_ns is None:
                seq.timeline.scheduled_ns, seq.timeline.launch_ns = batch.scheduled_ns, self._launch_ns
            if self._is_first_chunk(seq):
                self._emit(seq, "prefill_begin", len(batch), self._launch_ns)

    def collected(self, batch: ScheduledBatch) -> None:
        """The step's tokens are there, not yet appended; its counters still say what it computed."""
        now_ns = self.clock.now_ns()
        if self.costs is not None and batch.num_tokens > len(batch):
            work = [(seq.num_cached_tokens, seq.num_scheduled_tokens) for seq in batch.seqs]
            pairs = sum(new * (cached + new / 2) for cached, new in work)
            self.costs.observe(batch.num_tokens, (now_ns - self._launch_ns) / 1_000_000, pairs)
        for seq in batch.prefills:
            run = Run(self._launch_ns, now_ns, seq.num_scheduled_tokens, seq.num_preemptions)
            seq.timeline.prefill_runs.append(run)
            stage = "prefill_end" if seq.num_scheduled_tokens == seq.num_remaining_tokens else "prefill_chunk"
            self._emit(seq, stage, len(batch), now_ns, seq.num_scheduled_tokens)
        for seq in batch.sampling:
            self._emit(seq, "decode_step" if seq.timeline.token_ns else "first_token", len(batch), now_ns)
            seq.timeline.token_ns.append(now_ns)

    def handed_over(self, seq: Sequence) -> None:
        """The caller is given what is new of `seq`, which may be its end."""
        now_ns, timeline = self.clock.now_ns(), seq.timeline
        if timeline.num_handed_over < len(timeline.token_ns):
            timeline.num_handed_over = len(timeline.token_ns)
            if timeline.first_handover_ns is None:
                timeline.first_handover_ns = now_ns
                self._emit(seq, "first_handover", 0, now_ns)
            timeline.last_handover_ns = now_ns
        if seq.is_finished:
            end = "failed" if seq.finish_reason == "error" else ENDS.get(seq.status, "output_complete")
            self._emit(seq, end, 0, now_ns)  # the moment of the last hand-over
            self._emit(seq, "state_released", 0)

    def _is_first_chunk(self, seq: Sequence) -> bool:
        """First of this epoch: nothing ran since the last preemption."""
        runs = seq.timeline.prefill_runs
        return not runs or runs[-1].epoch != seq.num_preemptions

    def _emit(self, seq: Sequence, stage: str, batch_size: int, ts_ns: int | None = None, tokens: int = 0) -> None:
        self.events.request(
            seq.request_id,
            stage,
            seq.num_preemptions,
            seq.num_prompt_tokens,
            seq.num_completion_tokens,
            batch_size,
            ts_ns,
            tokens,
            seq.index,
        )
