"""A timeline as text: each term with its milliseconds, its label and its place in time.

What it is: the picture under an answer. What it knows nothing about: how the marks
came about. Invariants: every figure carries the timeline's label (`measured` or
`simulated`); a term whose moment never came shows a dash; indented terms lie inside
the one above them and are not added again.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from nanovllm.core.timeline import Timeline
from nanovllm.observe.statistics import percentile

BAR_WIDTH = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class DecodeStats:
    """The decode gaps of one request in one line. A request of one token has none."""

    count: int
    total_ns: int
    median_ns: float
    p99_ns: int

    @classmethod
    def of(cls, gaps_ns: list[int]) -> DecodeStats | None:
        """None without gaps. P99 is the nearest rank: a gap that really occurred."""
        if not gaps_ns:
            return None
        return cls(len(gaps_ns), sum(gaps_ns), median(gaps_ns), int(percentile(sorted(gaps_ns), 99)))

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: gaps over their time, the first token left out."""
        return self.count / self.total_ns * 1e9 if self.total_ns else 0.0


def render(timeline: Timeline) -> str:
    """The terms of one request as lines of text, the bars drawn on one scale from arrival to the end."""
    scale = timeline.end_to_end_ns or 0
    lines = [_row(name, start, length, scale, timeline.label) for name, start, length in _terms(timeline)]
    return "\n".join([*lines, *_summary(timeline)])


def _terms(t: Timeline) -> list[tuple[str, int | None, int | None]]:
    """(name, start, length) of each term, starts counted from arrival; None where it is not one stretch."""
    first_token = t.token_ns[0] if t.token_ns else None
    last_token = t.token_ns[-1] if t.token_ns else None
    gaps = t.decode_gaps_ns
    decode_ns = sum(gaps) if t.first_handover_ns is not None else None
    return [
        ("TTFT", 0, t.ttft_ns),
        ("  T_queue", 0, t.t_queue_ns),
        ("    T_intake", 0, t.t_intake_ns),
        ("    T_state", None, t.state_wait_ns),
        ("  T_schedule", t.t_queue_ns, t.t_schedule_ns),
        ("  T_prefill", _since(t, t.launch_ns), t.t_prefill_ns),
        ("    running", None, t.t_prefill_running_ns if t.prefill_runs else None),
        ("    waiting", None, t.t_prefill_waiting_ns),
        ("  T_return", _since(t, first_token), t.t_return_ns),
        ("decode", _since(t, t.first_handover_ns), decode_ns),
        ("T_stream", _since(t, last_token), t.t_stream_ns),
        ("end to end", 0, t.end_to_end_ns),
    ]


def _since(timeline: Timeline, mark_ns: int | None) -> int | None:
    return None if mark_ns is None else mark_ns - timeline.arrival_ns


def _row(name: str, start: int | None, length: int | None, scale: int, label: str) -> str:
    shown = "-" if length is None else f"{length / 1e6:,.2f} ms"
    return f"{name:<14}{shown:>14}  {label:<10}{_bar(start, length, scale)}".rstrip()


def _bar(start: int | None, length: int | None, scale: int) -> str:
    """A bar from `start`, `length` long, on a line of BAR_WIDTH characters for `scale`."""
    if not scale or start is None or not length:
        return ""
    offset = min(start * BAR_WIDTH // scale, BAR_WIDTH - 1)
    eighths = max(1, round(length * BAR_WIDTH * 8 / scale))
    full, rest = divmod(min(eighths, (BAR_WIDTH - offset) * 8), 8)
    return " " * offset + "█" * full + _EIGHTHS[rest].strip()


def _summary(t: Timeline) -> list[str]:
    """What the rows have no place for: gaps, chunks, preemptions."""
    chunks, times = len(t.prefill_runs), len(t.preempted_ns)
    lines = [f"prefill: {chunks} {'chunk' if chunks == 1 else 'chunks'}" + (f", preempted {times}x" if times else "")]
    stats = DecodeStats.of(t.decode_gaps_ns)
    if stats is None:
        return [*lines, "decode: no gap to measure"]
    gaps = "gap" if stats.count == 1 else "gaps"
    lines.append(
        f"decode: {stats.count} {gaps}, median {stats.median_ns / 1e6:,.2f} ms, P99 {stats.p99_ns / 1e6:,.2f} ms, "
        f"{stats.tokens_per_s:,.1f} tokens/s ({t.label})"
    )
    return lines
