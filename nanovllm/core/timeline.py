"""The timeline of one request: the course's time terms, from integer nanoseconds.

    arrival ──T_intake── queued ──(T_state)── schedule call ── launch ── first token ── first hand-over
       └────────────── T_queue ─────────────┘└ T_schedule ┘└ T_prefill ┘└── T_return ──┘
    first hand-over ──gap── token 2 ──gap── ... ──gap── token N ──T_stream── last hand-over

    TTFT       = T_queue + T_schedule + T_prefill + T_return
    T_end2end  = TTFT + sum(N_out - 1 decode gaps) + T_stream

What it is: marks that the engine sets as they happen, and the terms read off them.
What it knows nothing about: the event bus; a timeline is exact even when events
are dropped. T_intake and T_state are sub-terms of T_queue and never added to it.
The first decode gap starts at the first hand-over, so both sums hold to the nanosecond.
Every figure is `measured`, or `simulated` under a virtual clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Run:
    """One forward pass that computed known tokens of this request, [start_ns, end_ns), after `epoch` preemptions."""

    start_ns: int
    end_ns: int
    num_tokens: int
    epoch: int = 0


@dataclass
class Timeline:
    """Marks of one request in clock nanoseconds; None until the moment has come."""

    arrival_ns: int
    queued_ns: int | None = None
    scheduled_ns: int | None = None
    launch_ns: int | None = None
    first_handover_ns: int | None = None
    last_handover_ns: int | None = None
    released_ns: int | None = None
    token_ns: list[int] = field(default_factory=list)
    prefill_runs: list[Run] = field(default_factory=list)
    preempted_ns: list[int] = field(default_factory=list)
    state_wait_ns: int = 0
    num_handed_over: int = 0  # tokens the caller has
    hit_tokens_by_tier: dict[str, int] = field(default_factory=dict, compare=False)  # told by no event
    label: str = "measured"

    @property
    def t_intake_ns(self) -> int | None:
        """Validation, template and tokenizer: a sub-term of T_queue."""
        return _between(self.arrival_ns, self.queued_ns)

    @property
    def t_queue_ns(self) -> int | None:
        """From arrival to the start of the scheduling call that admits."""
        return _between(self.arrival_ns, self.scheduled_ns)

    @property
    def t_schedule_ns(self) -> int | None:
        """From the start of that scheduling call to the launch."""
        return _between(self.scheduled_ns, self.launch_ns)

    @property
    def t_prefill_ns(self) -> int | None:
        """From the launch to the first sampled token; chunk gaps and re-queues lie inside."""
        return _between(self.launch_ns, self.token_ns[0] if self.token_ns else None)

    @property
    def t_prefill_running_ns(self) -> int:
        """The part of T_prefill inside forward passes that held this request's prompt tokens."""
        first = self.token_ns[0] if self.token_ns else None
        return sum(run.end_ns - run.start_ns for run in self.prefill_runs if first is None or run.start_ns < first)

    @property
    def t_prefill_waiting_ns(self) -> int | None:
        """The rest of T_prefill: gaps between chunks, re-queues, the runner's own overhead."""
        total = self.t_prefill_ns
        return None if total is None else total - self.t_prefill_running_ns

    @property
    def t_return_ns(self) -> int | None:
        """From the first sampled token to its hand-over to the caller."""
        return _between(self.token_ns[0] if self.token_ns else None, self.first_handover_ns)

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token; equals the sum of its four terms."""
        return _between(self.arrival_ns, self.first_handover_ns)

    @property
    def decode_gaps_ns(self) -> list[int]:
        """N_out - 1 gaps: from the first hand-over to token 2, then token to token."""
        if self.first_handover_ns is None:
            return []
        marks = [self.first_handover_ns, *self.token_ns[1:]]
        return [after - before for before, after in pairwise(marks)]

    @property
    def t_stream_ns(self) -> int | None:
        """From the last sampled token to its hand-over; 0 where the first token was the last."""
        if len(self.token_ns) == 1 and self.last_handover_ns is not None:
            return self.last_handover_ns - (self.first_handover_ns or self.last_handover_ns)
        return _between(self.token_ns[-1] if self.token_ns else None, self.last_handover_ns)

    @property
    def end_to_end_ns(self) -> int | None:
        """From arrival to the last hand-over."""
        return _between(self.arrival_ns, self.last_handover_ns)

    def as_dict(self) -> dict[str, object]:
        """The terms by name in nanoseconds, for `--json` and logs."""
        return {
            "label": self.label,
            "ttft_ns": self.ttft_ns,
            "t_queue_ns": self.t_queue_ns,
            "t_intake_ns": self.t_intake_ns,
            "t_state_ns": self.state_wait_ns,
            "t_schedule_ns": self.t_schedule_ns,
            "t_prefill_ns": self.t_prefill_ns,
            "t_prefill_running_ns": self.t_prefill_running_ns,
            "t_prefill_waiting_ns": self.t_prefill_waiting_ns,
            "t_return_ns": self.t_return_ns,
            "decode_gaps_ns": self.decode_gaps_ns,
            "t_stream_ns": self.t_stream_ns,
            "end_to_end_ns": self.end_to_end_ns,
            "prefill_chunks": len(self.prefill_runs),
            "preemptions": len(self.preempted_ns),
        }


def _between(start: int | None, end: int | None) -> int | None:
    return None if start is None or end is None else end - start
