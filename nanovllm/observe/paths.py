"""Paths: each request's way through its stages, and each step's members, from a recording.

What it is: a replay of the events into the engine's own `Timeline`, so that every term has
one definition, and into spans: waiting, holding blocks, steps. What it knows nothing about:
statistics, causes, how any of it is shown. Invariants: for a request that completed, the
terms equal those the engine kept, to the nanosecond (T_state within one clock reading);
what the recording does not tell stays None; a request id that comes again is a new path.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nanovllm.core.events import TERMINAL_STAGES, RequestEvent, StepEvent, WaitEvent
from nanovllm.core.timeline import Run, Timeline
from nanovllm.observe.recording import Recording

COMPUTED = ("prefill_chunk", "prefill_end", "first_token", "decode_step")


class Span(NamedTuple):
    """[start_ns, end_ns), and the record that opened it. What never ended reaches to the recording's last moment."""

    start_ns: int
    end_ns: int
    seq: int
    stage: str

    @property
    def length_ns(self) -> int:
        """How long it lasted."""
        return self.end_ns - self.start_ns

    def within(self, start_ns: int, end_ns: int) -> int:
        """How much of it lies in [start_ns, end_ns)."""
        return max(0, min(self.end_ns, end_ns) - max(self.start_ns, start_ns))


class Member(NamedTuple):
    """One path's part of a step: the prompt tokens it computed (0 for a decode) and its record."""

    name: str
    prefill_tokens: int
    seq: int


@dataclass
class Step:
    """One step, from its launch to its tokens, with whoever ran in it."""

    event: StepEvent
    end_ns: int
    members: dict[str, Member] = field(default_factory=dict)  # by path

    @property
    def start_ns(self) -> int:
        """Its launch."""
        return self.event.ts_ns

    def within(self, start_ns: int, end_ns: int) -> int:
        """How much of it lies in [start_ns, end_ns)."""
        return max(0, min(self.end_ns, end_ns) - max(self.start_ns, start_ns))


@dataclass
class RequestPath:
    """One request, or one of its samples: `name` is its id, with `#2` or `[1]` where that alone is not unique."""

    name: str
    request_id: str
    timeline: Timeline
    prompt_len: int = 0
    generated_len: int = 0
    end: str | None = None  # its terminal stage; None while it lives
    events: list[RequestEvent] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)  # queued, or preempted and queued again
    holds: list[Span] = field(default_factory=list)  # blocks
    prefills: list[Span] = field(default_factory=list)  # holding blocks, with prompt or kept tokens to compute

    def event(self, stage: str) -> RequestEvent | None:
        """The first event of a stage."""
        return next((event for event in self.events if event.stage == stage), None)

    def known_tokens(self, at_ns: int) -> int:
        """Its prompt's tokens and those sampled up to a moment."""
        return self.prompt_len + bisect_right(self.timeline.token_ns, at_ns)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first epoch did not have to compute."""
        first = [run.num_tokens for run in self.timeline.prefill_runs if run.epoch == 0]
        return max(0, self.prompt_len - sum(first)) if first and self.timeline.token_ns else 0


@dataclass
class Replay:
    """Everything a recording tells, path by path and step by step."""

    recording: Recording
    paths: dict[str, RequestPath] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    waits: list[tuple[str, WaitEvent]] = field(default_factory=list)  # with the path each tells of


def replay(recording: Recording) -> Replay:
    """Read the events in their order."""
    return _Replayer(recording).run()


def holding_changes(
    paths: Iterator[RequestPath] | list[RequestPath], *, prefilling: bool = False
) -> list[tuple[int, int]]:
    """(moment, +1 or -1) of live requests, or of those that are still prefilling."""
    spans = [span for path in paths for span in (path.prefills if prefilling else path.holds)]
    return [change for span in spans for change in ((span.start_ns, 1), (span.end_ns, -1))]


class _Replayer:
    def __init__(self, recording: Recording) -> None:
        self.recording, self.out = recording, Replay(recording)
        self.end_ns = recording.end_ns
        self.current: dict[tuple[str, int], RequestPath] = {}  # (id, sample) -> the path under way
        self.open: dict[tuple[str, str], tuple[int, int, str]] = {}  # (name, kind of span) -> (since, seq, stage)
        self.generations: dict[str, int] = {}

    def run(self) -> Replay:
        for event in self.recording.events:
            if isinstance(event, RequestEvent):
                self._request(event)
            elif isinstance(event, StepEvent):
                self.out.steps.append(Step(event, event.ts_ns))
            elif isinstance(event, WaitEvent):
                path = self.current.get((event.request_id, 0))
                self.out.waits.append((path.name if path else event.request_id, event))
        for name, kind in list(self.open):
            self._close(self.out.paths[name], kind, self.end_ns)
        return self.out

    def _request(self, event: RequestEvent) -> None:
        path = self._path(event)
        path.events.append(event)
        path.prompt_len = max(path.prompt_len, event.prompt_len)
        path.generated_len = max(path.generated_len, event.generated_len)
        if event.batch_size and event.stage in COMPUTED and self.out.steps:
            self._computed(path, event, self.out.steps[-1])
        self._mark(path.timeline, event)
        self._spans(path, event)
        if event.stage in TERMINAL_STAGES:
            path.end = event.stage

    def _path(self, event: RequestEvent) -> RequestPath:
        key = (event.request_id, event.sample)
        known = self.current.get(key)
        is_new = known is None or (known.end is not None and event.stage in ("entered", "queued"))
        return self._open_path(event) if is_new or known is None else known

    def _open_path(self, event: RequestEvent) -> RequestPath:
        request_id, first = event.request_id, self.current.get((event.request_id, 0))
        if event.sample == 0:
            self.generations[request_id] = self.generations.get(request_id, 0) + 1
        number = self.generations.get(request_id, 1)
        name = request_id + (f"#{number}" if number > 1 else "") + (f"[{event.sample}]" if event.sample else "")
        arrival_ns = first.timeline.arrival_ns if event.sample and first else event.ts_ns
        path = RequestPath(name, request_id, Timeline(arrival_ns, label=self.recording.label))
        self.current[request_id, event.sample] = self.out.paths[name] = path
        return path

    def _computed(self, path: RequestPath, event: RequestEvent, step: Step) -> None:
        step.end_ns = max(step.end_ns, event.ts_ns)
        if event.stage.startswith("prefill"):
            path.timeline.prefill_runs.append(Run(step.start_ns, event.ts_ns, event.tokens, event.epoch))
            step.members[path.name] = Member(path.name, event.tokens, event.seq)
        else:
            step.members.setdefault(path.name, Member(path.name, 0, event.seq))

    def _mark(self, timeline: Timeline, event: RequestEvent) -> None:
        stage, at_ns = event.stage, event.ts_ns
        if stage == "queued":
            timeline.queued_ns = at_ns
        elif stage == "prefill_begin" and timeline.launch_ns is None:
            step = self.out.steps[-1].event if self.out.steps else None
            timeline.launch_ns, timeline.scheduled_ns = at_ns, step.scheduled_ns if step else at_ns
        elif stage in ("first_token", "decode_step"):
            timeline.token_ns.append(at_ns)
        elif stage == "first_handover":
            timeline.first_handover_ns, timeline.num_handed_over = at_ns, 1
        elif stage == "preempted":
            timeline.preempted_ns.append(at_ns)
        elif stage == "output_complete" and timeline.token_ns:
            timeline.last_handover_ns, timeline.num_handed_over = at_ns, len(timeline.token_ns)
        elif stage == "state_released":
            timeline.released_ns = at_ns

    def _spans(self, path: RequestPath, event: RequestEvent) -> None:
        stage, at_ns = event.stage, event.ts_ns
        if stage in ("queued", "preempted"):
            self._close_all(path, at_ns)
            self.open[path.name, "wait"] = (at_ns, event.seq, stage)
        elif stage in ("scheduled", "loading"):
            loaded = self._close(path, "load", at_ns)
            path.timeline.state_wait_ns += loaded.length_ns if loaded else 0
            self._close(path, "wait", at_ns)
            self.open.setdefault((path.name, "hold"), (at_ns, event.seq, stage))
            self.open[path.name, "load" if stage == "loading" else "prefill"] = (at_ns, event.seq, stage)
        elif stage in ("prefill_end", "decode_step"):
            self._close(path, "prefill", at_ns)
        elif stage in TERMINAL_STAGES:
            self._close_all(path, at_ns)

    def _close_all(self, path: RequestPath, at_ns: int) -> None:
        for kind in ("wait", "load", "prefill", "hold"):
            self._close(path, kind, at_ns)

    def _close(self, path: RequestPath, kind: str, at_ns: int) -> Span | None:
        since = self.open.pop((path.name, kind), None)
        if since is None:
            return None
        span = Span(since[0], max(since[0], at_ns), since[1], since[2])
        kept = {"wait": path.waits, "hold": path.holds, "prefill": path.prefills}.get(kind)
        if kept is not None:
            kept.append(span)
        return span
