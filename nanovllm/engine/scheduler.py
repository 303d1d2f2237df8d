"""Scheduler: who runs in the next step, and how many tokens each.

What it is: the queues and the rules that keep every policy correct. What it knows
nothing about: torch, text, the clock's kind, where KV lies. Its batch unpacks to
`(seqs, is_prefill)` as the course prints it.

Invariants: a sequence is in exactly one of waiting, loading, running until it ends;
a running sequence's blocks cover its known tokens when it is scheduled; the tokens
of a step stay within the budget; whoever is preempted keeps its tokens and its rank.
A decode costs one token of the budget; a prefill is cut into chunks to fit it, shorter
ones while others decode. An exception of a verb on one sequence leaves as its
`SequenceFault`; whatever was done before holds, so scheduling may simply be asked again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from types import MappingProxyType

from nanovllm.core.clock import Clock
from nanovllm.core.events import EventBus
from nanovllm.engine.faults import OnBehalfOf, SequenceFault
from nanovllm.engine.grammar import Mask
from nanovllm.engine.growth import GrowthForecast
from nanovllm.engine.kv_state import KVState, TransferReport
from nanovllm.engine.policy import SchedulingPolicy
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.state_count import count_state
from nanovllm.engine.waits import WaitLog
from nanovllm.observe.statistics import StateCount

NO_TIERS: Mapping[str, int] = MappingProxyType({})
FinishCheck = Callable[[Sequence, int], str | None]


@dataclass
class ScheduledBatch:
    """The sequences one step runs; each carries its `num_scheduled_tokens`."""

    scheduled_ns: int = 0  # when the scheduling call began
    seqs: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    num_decodes: int = 0  # sequences that wait for this step's end to have their next token
    sampling: list[Sequence] = field(default_factory=list)  # those of `seqs` that get a token from it
    masks: dict[Sequence, Mask] = field(default_factory=dict)  # which tokens the grammars of these allow next

    @property
    def prefills(self) -> list[Sequence]:
        """Those that compute prompts: the decodes stand before them."""
        return self.seqs[self.num_decodes :]

    @property
    def is_prefill(self) -> bool:
        """True if any sequence computes more than its last token; our own code never reads it."""
        return any(seq.num_scheduled_tokens > 1 for seq in self.seqs)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        """Take `seq` in with the next `num_tokens` of its known tokens."""
        seq.num_scheduled_tokens = num_tokens
        self.seqs.append(seq)
        self.num_tokens += num_tokens

    def __iter__(self) -> Iterator[object]:
        return iter((self.seqs, self.is_prefill))

    def __len__(self) -> int:
        return len(self.seqs)


class Scheduler:
    """Continuous batching over `KVState`, ranked by a `SchedulingPolicy`."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        kv: KVState,
        clock: Clock,
        events: EventBus,
        *,
        block_size: int,
        watermark_blocks: int = 0,
    ) -> None:
        self.policy, self.kv, self.clock, self.events = policy, kv, clock, events
        self.block_size, self.watermark_blocks = block_size, watermark_blocks
        self.waiting: list[Sequence] = []  # in rank order
        self.loading: dict[Sequence, tuple[int, int]] = {}  # seq -> (generation, since_ns)
        self.running: list[Sequence] = []  # in rank order
        self.num_preemptions = 0
        self.growth = GrowthForecast(block_size)
        self.waits = WaitLog(events, kv)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        insort(self.waiting, seq, key=self.policy.queue_key)
        self._emit(seq, "queued", seq.timeline.queued_ns)

    def is_finished(self) -> bool:
        """True when nobody waits, loads or runs."""
        return not (self.waiting or self.loading or self.running)

    def live(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return [*self.running, *self.loading, *self.waiting]

    def count_state(self) -> StateCount:
        """The state counter, for policies, metrics and observers."""
        return count_state(self.kv, [*self.running, *self.loading], self.block_size, num_waiting=len(self.waiting))

    # -- one step ----------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """Choose the next batch: decodes first, then chunks beside them, then new sequences."""
        # BEGIN SOLUTION schedule
        batch, separate = ScheduledBatch(self.clock.now_ns()), self.policy.mode == "separate"
        passes = [self._schedule_decodes, self._schedule_prefills]
        for schedule_pass in [*(reversed(passes) if separate else passes), self._schedule_yielding]:
            if not (separate and batch):
                schedule_pass(batch)
        return batch
        # END SOLUTION

    def postprocess(
        self,
        seqs: Seq[Sequence],
        token_ids: Seq[int | None],
        is_prefill: bool | None = None,
        *,
        finish_check: FinishCheck,
    ) -> list[Sequence]:
        """Append what was sampled and end what is complete; returns the sequences that ended.

        `token_ids[i]` is None where sequence i has prompt tokens left. `is_prefill` is the course's
        third argument; the counters say the same per sequence, so it is not read.
        """
        # BEGIN SOLUTION postprocess
        ended = []
        for seq, token_id in zip(seqs, token_ids, strict=True):
            seq.num_scheduled_tokens = 0
            if token_id is not None:
                seq.append_token(token_id)
                seq.finish_reason = finish_check(seq, token_id)
            elif seq.prefill_only and seq.num_remaining_tokens == 0:
                seq.finish_reason = "prefilled"
            if seq.finish_reason is not None:
                self.end(seq, SequenceStatus.FINISHED)
                ended.append(seq)
        return ended
        # END SOLUTION

    def preempt(self, seq: Sequence, beneficiary: Sequence | None = None) -> None:
        """Take the blocks from a running sequence; it keeps its tokens and recomputes their KV later."""
        # BEGIN SOLUTION preempt
        with OnBehalfOf(seq, "release"):
            self.kv.release(seq)
        self.running.remove(seq)
        seq.move_to(SequenceStatus.WAITING)
        seq.num_scheduled_tokens = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.growth.preempted(seq)
        seq.timeline.preempted_ns.append(self.clock.now_ns())
        insort(self.waiting, seq, key=self.policy.queue_key)
        self._emit(seq, "preempted", seq.timeline.preempted_ns[-1])
        self.waits.preempted(seq, beneficiary)
        # END SOLUTION

    def end(self, seq: Sequence, status: SequenceStatus) -> None:
        """Bring a sequence to its end, from wherever it is, and give its blocks back."""
        self.loading.pop(seq, None)
        for queue in (self.waiting, self.running):  # in none of them where a fault caught it on its way
            if seq in queue:
                queue.remove(seq)
        seq.num_scheduled_tokens = 0
        seq.move_to(status)  # whatever the next line raises, this sequence has ended
        self.kv.release(seq)
        if status is SequenceStatus.FINISHED and not seq.prefill_only:
            self.growth.ended(seq)
        seq.timeline.released_ns = self.clock.now_ns()

    def unschedule(self) -> None:
        """The step under way will not run: nothing of it counts."""
        for seq in self.running:
            seq.num_scheduled_tokens = 0

    def promote(self, seq: Sequence) -> None:
        """A prefill-only sequence becomes an ordinary one that will decode."""
        queue = self.waiting if seq in self.waiting else self.running if seq in self.running else None
        if queue is not None:
            queue.remove(seq)
        seq.prefill_only = False
        if queue is not None:
            insort(queue, seq, key=self.policy.queue_key)

    # -- state that arrives ------------------------------------------------------------------------

    def apply_transfers(self, reports: list[TransferReport]) -> None:
        """Let sequences whose load ended run, or compute where it failed. Late reports are ignored."""
        for report in reports:
            seq = report.seq
            if seq not in self.loading or self.loading[seq][0] != report.generation:
                continue
            _, since_ns = self.loading.pop(seq)
            seq.timeline.state_wait_ns += self.clock.now_ns() - since_ns
            if report.ok:
                self.kv.commit(seq, min(report.num_tokens, seq.num_remaining_tokens - 1))  # one is always computed
                self._count_hits(seq, seq.num_cached_tokens, below=report.tokens_by_tier)
                self._start(seq)
            else:
                self.kv.release(seq)
                seq.skip_external_state = True
                seq.move_to(SequenceStatus.WAITING)
                insort(self.waiting, seq, key=self.policy.queue_key)

    # -- the passes --------------------------------------------------------------------------------

    def _schedule_decodes(self, batch: ScheduledBatch) -> None:
        """One token for each decoding sequence, best rank first; the worst ranks give way when blocks run out."""
        for seq in [s for s in self.running if not s.is_prefilling]:
            if len(batch) >= self.policy.max_num_seqs or batch.num_tokens >= self.policy.max_num_batched_tokens:
                break
            if seq.status is SequenceStatus.RUNNING and self._make_room(seq, batch):
                batch.add(seq, 1)
                batch.num_decodes += 1

    def _make_room(self, seq: Sequence, batch: ScheduledBatch) -> bool:
        """Grow `seq`, preempting who ranks last and is not in the batch; False where that is `seq` itself."""
        while not self._grow(seq):
            victim = self.policy.victim([s for s in self.running if s.num_scheduled_tokens == 0])
            self.preempt(victim, seq)
            if victim is seq:
                return False
        return True

    def _grow(self, seq: Sequence) -> bool:
        try:  # what OnBehalfOf does, for less: once for each sequence in each step
            return self.kv.grow(seq)
        except SequenceFault:
            raise
        except Exception as error:
            raise SequenceFault(seq, "grow") from error

    def _schedule_prefills(self, batch: ScheduledBatch) -> None:
        """The next chunk of each prefill under way, then new sequences."""
        for seq in [s for s in self.running if s.is_prefilling and not s.prefill_only]:
            self._schedule_chunk(seq, batch)
        if self.policy.prefill_during_decode or not any(not s.is_prefilling for s in self.running):
            self._admit(batch)
        elif self.waiting:
            self.waits.stopped(self.waiting[0], "policy")

    def _schedule_yielding(self, batch: ScheduledBatch) -> None:
        """Requests that only prefill get what all others left."""
        for seq in [s for s in self.running if s.prefill_only]:
            self._schedule_chunk(seq, batch)

    def _schedule_chunk(self, seq: Sequence, batch: ScheduledBatch) -> None:
        room = self._prefill_room(batch)
        chunk = min(seq.num_remaining_tokens, room, self.policy.max_prefill_chunk or room)
        if chunk > 0 and len(batch) < self.policy.max_num_seqs:
            batch.add(seq, chunk)

    def _prefill_room(self, batch: ScheduledBatch) -> int:
        """Tokens that prefills may still take in this step; fewer where sequences decode in it, whose gap it is."""
        room, limit = self.policy.max_num_batched_tokens - batch.num_tokens, self.policy.max_prefill_beside_decode
        if limit is None or not batch.num_decodes:
            return room
        return min(room, limit + batch.num_decodes - batch.num_tokens)

    def _admit(self, batch: ScheduledBatch) -> None:
        """Take waiting sequences in rank order until one does not fit.

        One whose prefix somebody computes right now is passed over: it will find that prefix published.
        """
        limit = self.policy.max_new_requests_per_step or len(self.waiting)
        for seq in list(self.waiting):
            stop = "new_requests_cap" if limit == 0 else self._over_budget(seq, batch)
            if stop is not None:
                self.waits.stopped(seq, stop)
                break
            with OnBehalfOf(seq, "match"):
                match = self.kv.match(seq)
            if match.producer is not None:
                self.waits.follows(seq, match.producer)
                continue
            if not self._make_room_to_enter(seq):
                self.waits.lacks_room(seq, seq.num_blocks - match.num_held_blocks, self._headroom(seq))
                break
            self._count_hits(seq, match.num_hit_tokens, match.num_potential_tokens)
            self._bind(seq, batch)
            limit -= 1

    def _make_room_to_enter(self, seq: Sequence) -> bool:
        """Whether `seq` may be admitted; requests that only prefill give their blocks up for it."""
        while not self._has_room(seq):
            yielding = [s for s in self.running if s.prefill_only and s.num_scheduled_tokens == 0]
            if seq.prefill_only or not yielding:
                return False
            self.preempt(self.policy.victim(yielding), seq)
        return True

    def _has_room(self, seq: Sequence) -> bool:
        headroom = self._headroom(seq)
        with OnBehalfOf(seq, "has_room"):
            return self.kv.has_room(seq, headroom)

    def _over_budget(self, seq: Sequence, batch: ScheduledBatch) -> str | None:
        """Which limit of a step keeps `seq` out; None where it may enter."""
        held = sum(seq.prefill_only or not other.prefill_only for other in self.running)
        if held >= self.policy.max_num_seqs or len(batch) >= self.policy.max_num_seqs:
            return "batch_cap"
        may_admit = self.policy.may_admit
        if may_admit is not None and self.running and not may_admit(seq, self.count_state()):
            return "policy"
        return None if self._prefill_room(batch) > 0 else "token_budget"

    def _bind(self, seq: Sequence, batch: ScheduledBatch) -> None:
        with OnBehalfOf(seq, "bind"):
            generation = self.kv.bind(seq).generation
        self.waiting.remove(seq)
        if generation is not None:
            self.loading[seq] = (generation, self.clock.now_ns())
            seq.move_to(SequenceStatus.WAITING_FOR_STATE)
            self._emit(seq, "loading")
            return
        self._start(seq)
        if not seq.prefill_only:
            self._schedule_chunk(seq, batch)

    def _start(self, seq: Sequence) -> None:
        seq.move_to(SequenceStatus.RUNNING)
        insort(self.running, seq, key=self.policy.queue_key)
        self._emit(seq, "scheduled")

    def _count_hits(
        self,
        seq: Sequence,
        num_hit_tokens: int,
        num_potential_tokens: int | None = None,
        below: Mapping[str, int] = NO_TIERS,
    ) -> None:
        """Of the first admission: what a preempted sequence finds again is its own work. `below`: by lower tier."""
        if not seq.timeline.preempted_ns:
            seq.num_hit_tokens = num_hit_tokens
            by_tier = {"device": num_hit_tokens - sum(below.values()), **below}
            seq.timeline.hit_tokens_by_tier = {tier: tokens for tier, tokens in by_tier.items() if tokens}
            seq.num_potential_hit_tokens = num_hit_tokens if num_potential_tokens is None else num_potential_tokens

    def _headroom(self, seq: Sequence) -> int:
        """Blocks to leave free when `seq` enters: what all who hold blocks will need to grow, and the watermark.

        With nobody running it asks for nothing: whatever was admitted at intake can run alone.
        """
        held = [*self.running, *self.loading]
        return self.watermark_blocks + max(len(held), self.growth.growth_blocks([*held, seq])) if held else 0

    def _emit(self, seq: Sequence, stage: str, ts_ns: int | None = None) -> None:
        lengths = (seq.num_prompt_tokens, seq.num_completion_tokens)
        self.events.request(seq.request_id, stage, seq.num_preemptions, *lengths, ts_ns=ts_ns, sample=seq.index)
