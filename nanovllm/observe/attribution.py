"""Attribution: every nanosecond of a request's life, given to the cause that the records tell.

What it is: `pieces`, which cuts one path's life at its records and names what each piece was
spent on and which record says so. What it knows nothing about: verdicts, prose, how long is
too long. Invariants: the pieces of a life join without gap or overlap, so shares of time add up
to one; a cause is named only where a record tells it; `work` is decoding at the pace of this
run's own fastest steps: nobody is to blame for it.

    queue       long_step intake batch_cap arrival_burst token_budget admission_cap policy head_of_line producer
                not_told
    state       blocks_exhausted fragmentation reservation preemption state_load
    execution   prefill prefill_of_others decode uneven_steps output
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from nanovllm.core.events import WaitEvent
from nanovllm.observe.bursts import Bursts
from nanovllm.observe.demand import ROOM, Demand
from nanovllm.observe.pace import Pace
from nanovllm.observe.paths import Replay, RequestPath, Span, Step

CLASSES = MappingProxyType(
    {
        "long_step": "queue",
        "intake": "queue",
        "batch_cap": "queue",
        "arrival_burst": "queue",
        "token_budget": "queue",
        "admission_cap": "queue",
        "policy": "queue",
        "head_of_line": "queue",
        "producer": "queue",
        "not_told": "queue",
        "blocks_exhausted": "state",
        "fragmentation": "state",
        "reservation": "state",
        "preemption": "state",
        "state_load": "state",
        "prefill": "execution",
        "prefill_of_others": "execution",
        "decode": "execution",
        "uneven_steps": "execution",
        "output": "execution",
    }
)
CAPS_OF_STEPS = ("batch_cap", "token_budget", "admission_cap")
WORK = "work"
EMPTY_SLOTS = 0.5  # of the slots of held blocks: from here on blocks are short because they are badly filled
_BY_REASON = MappingProxyType(
    {
        "blocks": "blocks_exhausted",
        "headroom": "reservation",
        "batch_cap": "batch_cap",
        "token_budget": "token_budget",
        "new_requests_cap": "admission_cap",
        "policy": "policy",
    }
)


class Piece(NamedTuple):
    """[start_ns, end_ns) of a life, spent on `cause`; `behind`: whose doing it was; `seq`: the record that tells it.

    `beside` is another cause without which this one had not been: each has half of what they caused together.
    """

    start_ns: int
    end_ns: int
    cause: str
    behind: tuple[str, ...]
    seq: int
    beside: str = ""


class Told(NamedTuple):
    """A refusal of the head of the line, with the path it was told of."""

    at_ns: int
    head: str
    event: WaitEvent


@dataclass
class Attribution:
    """The pieces of all paths of one run."""

    run: Replay

    def __post_init__(self) -> None:
        told = [Told(event.ts_ns, name, event) for name, event in self.run.waits]
        self.heads = [t for t in told if t.event.reason not in ("producer", "preempted")]
        self.own = [t for t in told if t.event.reason in ("producer", "preempted")]
        self.step_starts = [step.start_ns for step in self.run.steps]
        self.pace = Pace(self.run.steps)
        self.bursts, self.demand = Bursts(self.run), Demand(self.run)
        self.full = {t.event.seq for t in self.heads if t.event.reason == "batch_cap" and self._is_full(t)}
        self._holders: dict[int, dict[str, int]] = {}
        self.pieces = {name: list(self._life(path)) for name, path in self.run.paths.items()}

    def steps_between(self, start_ns: int, end_ns: int) -> list[Step]:
        """Steps that overlap [start, end)."""
        first = max(0, bisect_right(self.step_starts, start_ns) - 1)
        last = bisect_right(self.step_starts, end_ns)
        return [step for step in self.run.steps[first:last] if step.within(start_ns, end_ns)]

    def holders(self, at_ns: int) -> dict[str, int]:
        """Blocks that each live path holds at a moment, block-exact from its tokens, sharing left out."""
        if at_ns not in self._holders:
            size = self.run.recording.header.block_size
            held = [p for p in self.run.paths.values() if any(s.start_ns <= at_ns < s.end_ns for s in p.holds)]
            self._holders[at_ns] = {path.name: -(-path.known_tokens(at_ns) // size) for path in held}
        return self._holders[at_ns]

    # -- a life --------------------------------------------------------------------------------------

    def _life(self, path: RequestPath) -> Iterator[Piece]:
        entered = path.events[0]
        if path.timeline.queued_ns is not None:
            yield from self._intake(path, path.timeline.arrival_ns, path.timeline.queued_ns, entered.seq)
        for wait in path.waits:
            yield from self._preempted(path, wait) if wait.stage == "preempted" else self._queued(path, wait)
        for hold in path.holds:
            yield from self._held(path, hold)

    def _intake(self, path: RequestPath, start_ns: int, end_ns: int, seq: int) -> Iterator[Piece]:
        """Validation and tokenizer, or the step during which the request came."""
        at_ns = start_ns
        for step in self.steps_between(start_ns, end_ns):
            yield from _gap(at_ns, max(at_ns, step.start_ns), "intake", seq)
            at_ns = max(at_ns, step.start_ns)
            stop_ns = min(step.end_ns, end_ns)
            yield from _gap(at_ns, stop_ns, "long_step", step.event.seq, _prefillers(step, path.name))
            at_ns = max(at_ns, stop_ns)
        yield from _gap(at_ns, end_ns, "intake", seq)

    def _preempted(self, path: RequestPath, wait: Span) -> Iterator[Piece]:
        told = next((t for t in self.own if t.head == path.name and t.at_ns >= wait.start_ns), None)
        behind = (told.event.behind,) if told and told.event.behind else ()
        yield from _gap(wait.start_ns, wait.end_ns, "preemption", told.event.seq if told else wait.seq, behind)

    def _queued(self, path: RequestPath, wait: Span) -> Iterator[Piece]:
        """A wait in the queue, cut wherever another refusal was told."""
        before = [t for t in self.heads if t.at_ns <= wait.start_ns and self._still_waits(t, wait.start_ns)][-1:]
        inside = [t for t in self.heads if wait.start_ns < t.at_ns < wait.end_ns]
        follows = [t for t in self.own if t.head == path.name and wait.start_ns <= t.at_ns < wait.end_ns]
        told = {t.event.seq: t for t in sorted([*before, *inside, *follows], key=lambda t: t.event.seq)}
        at_ns = wait.start_ns
        cause, behind, seq = "not_told", tuple[str, ...](), wait.seq
        for refusal, binding in zip(told.values(), self.demand.binding([t.event for t in told.values()], wait)):
            until_ns = max(at_ns, refusal.at_ns)
            yield from self._waited(at_ns, until_ns, cause, seq, behind, wait)
            at_ns, seq = until_ns, binding.seq
            cause, behind = self._cause(path, told[seq], wait)
        yield from self._waited(at_ns, wait.end_ns, cause, seq, behind, wait)

    def _waited(
        self, start_ns: int, end_ns: int, cause: str, seq: int, behind: tuple[str, ...], wait: Span
    ) -> Iterator[Piece]:
        """A part of a wait: whole, or half of it to the limit and half to what else the wait needed to be one."""
        beside = "arrival_burst" if cause in CAPS_OF_STEPS and wait in self.bursts else ""
        if not beside and cause == "batch_cap" and seq in self.full:
            beside = "blocks_exhausted"
        if not beside:
            yield from _gap(start_ns, end_ns, cause, seq, behind)
            return
        middle_ns, others = (start_ns + end_ns) // 2, () if beside == "arrival_burst" else behind
        yield from (p._replace(beside=beside) for p in _gap(start_ns, middle_ns, cause, seq, behind))
        yield from (p._replace(beside=cause) for p in _gap(middle_ns, end_ns, beside, seq, others))

    def _is_full(self, told: Told) -> bool:
        """Whether the head would not have fitted either, its prefix found and nothing kept free for growth."""
        head = self.run.paths.get(told.head)
        if head is None:
            return False
        tokens = head.known_tokens(told.at_ns) - head.cached_tokens
        return -(-tokens // self.run.recording.header.block_size) > told.event.free_blocks

    def _still_waits(self, told: Told, at_ns: int) -> bool:
        path = self.run.paths.get(told.head)
        return path is not None and any(w.start_ns <= told.at_ns and at_ns < w.end_ns for w in path.waits)

    def _cause(self, path: RequestPath, told: Told, wait: Span) -> tuple[str, tuple[str, ...]]:
        """What a refusal means for `path`, which may stand behind the head it was told of."""
        event = told.event
        if event.reason == "producer":
            return "producer", (event.behind,)
        overtook = self._overtakers(path, told.at_ns, wait)
        if overtook:
            return "policy", overtook
        own_blocks = -(-path.prompt_len // self.run.recording.header.block_size)
        if told.head != path.name and event.reason in ROOM and own_blocks + event.headroom <= event.free_blocks:
            return "head_of_line", (told.head,)
        cause = _BY_REASON[event.reason]
        if cause in ("blocks_exhausted", "reservation") and self._is_fragmented(told):
            cause = "fragmentation"
        return cause, _largest(self.holders(told.at_ns), path.name)

    def _overtakers(self, path: RequestPath, at_ns: int, wait: Span) -> tuple[str, ...]:
        """Who came later and holds blocks while `path` waits: the ranking's doing, under a policy that is not FCFS."""
        if self.run.recording.header.policy == "fcfs":
            return ()
        arrival_ns = path.timeline.arrival_ns
        later = (p for p in self.run.paths.values() if p.timeline.arrival_ns > arrival_ns)
        return tuple(p.name for p in later if any(s.start_ns < wait.end_ns and s.end_ns > at_ns for s in p.holds))[:3]

    def _is_fragmented(self, told: Told) -> bool:
        """Whether at least half of the held slots are empty, and the head would fit if held blocks were full."""
        header, head = self.run.recording.header, self.run.paths[told.head]
        tokens = sum(self.run.paths[name].known_tokens(told.at_ns) for name in self.holders(told.at_ns))
        slots = (header.num_blocks - told.event.free_blocks) * header.block_size
        wanted = head.known_tokens(told.at_ns) + told.event.headroom * header.block_size
        fits = tokens + wanted <= header.num_blocks * header.block_size
        return fits and slots > 0 and tokens <= slots * (1 - EMPTY_SLOTS)

    # -- while it holds blocks ------------------------------------------------------------------------

    def _held(self, path: RequestPath, hold: Span) -> Iterator[Piece]:
        """Step by step; what lies between steps is scheduling, sampling's host side and handing over."""
        at_ns = hold.start_ns
        loaded_ns = next((e.ts_ns for e in path.events if e.stage == "scheduled" and e.ts_ns >= hold.start_ns), at_ns)
        if hold.stage == "loading":
            yield from _gap(at_ns, min(loaded_ns, hold.end_ns), "state_load", hold.seq)
            at_ns = min(loaded_ns, hold.end_ns)
        for step in self.steps_between(at_ns, hold.end_ns):
            start_ns, end_ns = max(at_ns, step.start_ns), min(step.end_ns, hold.end_ns)
            yield from _gap(at_ns, start_ns, "output", step.event.seq)
            yield from self._in_step(path, step, start_ns, end_ns)
            at_ns = max(at_ns, end_ns)
        yield from _gap(at_ns, hold.end_ns, "output", hold.seq)

    def _in_step(self, path: RequestPath, step: Step, start_ns: int, end_ns: int) -> Iterator[Piece]:
        member = step.members.get(path.name)
        others, seq = _prefillers(step, path.name), step.event.seq
        is_decoding = bool(path.timeline.token_ns) and path.timeline.token_ns[0] <= step.start_ns
        if member is None:
            cause = "prefill_of_others" if others and is_decoding else "batch_cap" if is_decoding else "token_budget"
            yield from _gap(start_ns, end_ns, cause, seq, others)
        elif member.prefill_tokens and (path.timeline.preempted_ns or [end_ns])[0] < start_ns:
            yield from _gap(start_ns, end_ns, "preemption", seq)  # its KV is computed once more
        elif member.prefill_tokens:
            tokens = step.event.prefill_tokens + step.event.decode_tokens
            middle_ns = start_ns + (end_ns - start_ns) * member.prefill_tokens // max(tokens, 1)
            yield from _gap(start_ns, middle_ns, "prefill", seq)
            yield from _gap(middle_ns, end_ns, "prefill_of_others" if others else "prefill", seq, others)
        else:
            yield from self._decoding(step, start_ns, end_ns, others)

    def _decoding(self, step: Step, start_ns: int, end_ns: int, others: tuple[str, ...]) -> Iterator[Piece]:
        """A decode: the run's best pace, then what the batch adds, then what this step alone took longer."""
        best_ns = end_ns - start_ns if self.pace.best_ns is None else self.pace.best_ns
        paced_ns = min(start_ns + best_ns, end_ns)
        usual_ns = None if others else self.pace.usual_ns(step)
        uneven_ns = end_ns if usual_ns is None else min(max(paced_ns, start_ns + usual_ns), end_ns)
        yield from _gap(start_ns, paced_ns, WORK, step.event.seq)
        yield from _gap(paced_ns, uneven_ns, "prefill_of_others" if others else "decode", step.event.seq, others)
        yield from _gap(uneven_ns, end_ns, "uneven_steps", step.event.seq)


def _gap(start_ns: int, end_ns: int, cause: str, seq: int, behind: tuple[str, ...] = ()) -> Iterator[Piece]:
    if end_ns > start_ns:
        yield Piece(start_ns, end_ns, cause, behind, seq)


def _prefillers(step: Step, name: str) -> tuple[str, ...]:
    """Who else computes prompt tokens in a step, most tokens first."""
    found = sorted(
        (m for m in step.members.values() if m.prefill_tokens and m.name != name), key=lambda m: -m.prefill_tokens
    )
    return tuple(member.name for member in found[:3])


def _largest(holders: dict[str, int], name: str) -> tuple[str, ...]:
    ranked = sorted((other for other in holders if other != name), key=lambda other: -holders[other])
    return tuple(ranked[:3])
