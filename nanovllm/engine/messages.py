"""What an engine and its caller say to each other when they do not share a thread.

What it is: plain records, and their bytes on a pipe. What it knows nothing about:
threads, sockets, HTTP. Invariant: a message holds nothing but numbers, strings, lists
and maps, so the same words work within a process and between two.

    caller -> engine     Submit, Abort, Watch, StateCall, Stop
    engine -> caller     Ready, Heartbeat, StepReport, StateView, StateAnswer, Died
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import Segment, SegmentSpan
from nanovllm.core.timeline import Timeline
from nanovllm.engine.outputs import RequestOutput, StepOutput, TokenLogprobs
from nanovllm.errors import InvalidRequestError, NanoVLLMError

MAX_FRAME_BYTES = 64 * 2**20
LENGTH_BYTES = 4


class Submit(msgspec.Struct, tag=True, frozen=True):
    """A request that passed intake on the caller's side: token ids in, deltas out. `segments` name its parts."""

    request_id: str
    token_ids: list[int]
    params: dict[str, Any]
    namespace: str = ""
    cache_salt: str = ""
    priority: int = 0
    template_tokens: int | None = None
    arrival_ns: int | None = None
    segments: tuple[SegmentSpan, ...] = ()
    prefill_only: bool = False
    session_id: str = ""
    session_owner: str = ""


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for this request any more; unknown and ended ones are no error."""

    request_id: str


class Watch(msgspec.Struct, tag=True, frozen=True):
    """Say every `period_s` what the engine holds; 0: nobody looks any more."""

    period_s: float


class StateCall(msgspec.Struct, tag=True, frozen=True):
    """A call on the state store, run between two steps; see `state_calls`."""

    call_id: int
    verb: str
    args: dict[str, Any]


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Abort what lives and end the loop."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What was decided at start; it does not change."""

    model: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_mode: str
    dtype: str
    device: str
    label: str = "measured"
    block_bytes: int = 0  # 0 where there are no tensors


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges of this moment, and counters since the start."""

    running: int = 0
    waiting: int = 0
    loading: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    live_requests: int = 0  # that hold blocks; of them `prefilling_requests` still compute their prompt
    prefilling_requests: int = 0
    table_entries: int = 0  # of their block tables: a shared block counts once for each
    steps: int = 0
    bad_steps_in_a_row: int = 0
    preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_tokens_per_s: float = 0.0  # see `PrefillRate`
    events_dropped: int = 0
    state: dict[str, int] = msgspec.field(default_factory=dict)  # `TieredState.facts`
    tiers: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)  # `Place.facts`, a tenth of a second old


class Delta(msgspec.Struct, frozen=True):
    """What is new of one sample. `logprobs`: per token, the chosen one first, then the top ones."""

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as data; `as_error` makes it one again."""

    status: int
    code: str
    message: str
    param: str | None = None
    hint: str | None = None

    @classmethod
    def of(cls, error: NanoVLLMError) -> ErrorInfo:
        """The data of an error of our tree."""
        return cls(error.status, error.code, error.message, error.param, error.hint)

    def as_error(self) -> NanoVLLMError:
        """An error of the class that has this code, or of the base with code and status set."""
        kind = next((k for k in _tree(NanoVLLMError) if k.code == self.code), NanoVLLMError)
        error = kind(self.message, param=self.param, hint=self.hint)
        error.status, error.code = self.status, self.code
        return error


class Timings(msgspec.Struct, frozen=True):
    """The time terms of `core/timeline.py`, nanoseconds, of the request's first sample."""

    arrival_ns: int
    t_queue_ns: int | None = None
    t_intake_ns: int | None = None
    t_state_ns: int | None = None
    t_schedule_ns: int | None = None
    t_prefill_ns: int | None = None
    t_return_ns: int | None = None
    ttft_ns: int | None = None
    t_stream_ns: int | None = None
    end_to_end_ns: int | None = None
    preemptions: int = 0
    decode_gaps_ns: list[int] = msgspec.field(default_factory=list)


class Finished(msgspec.Struct, frozen=True):
    """A request has ended; its last deltas are in the same report."""

    request_id: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    longest_completion: int = 0  # of its samples
    cached_tokens: int = 0
    template_tokens: int | None = None
    finish_reasons: list[str] = msgspec.field(default_factory=list)
    error: ErrorInfo | None = None
    timings: Timings | None = None
    hit_tokens_by_tier: dict[str, int] = msgspec.field(default_factory=dict)  # the sum is cached_tokens


class RequestView(msgspec.Struct, frozen=True):
    """One live request: `intake`, `queued`, `loading`, `prefill`, `decode` or `preempted`; no text and no token ids.

    `computed_tokens` have KV now, `cached_tokens` were found; `waits` are [preempted, running again) in clock
    nanoseconds; `block_ids` holds a block once for each sample that has it.
    """

    request_id: str
    stage: str
    arrival_ns: int
    samples: int = 1
    prompt_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    timings: Timings | None = None
    waits: list[tuple[int, int | None]] = msgspec.field(default_factory=list)
    block_ids: list[int] = msgspec.field(default_factory=list)


class StateView(msgspec.Struct, tag=True, frozen=True):
    """What the engine holds at `ts_ns` of its clock, and the newest events since the view before, as records.

    `cached_ids`: free blocks that can still be found; `held_ids`: blocks with a claim beside the block tables.
    `receipts`: the newest of the state plane since the view before.
    """

    ts_ns: int
    stats: EngineStats
    requests: list[RequestView]
    num_requests: int
    cached_ids: list[int]
    held_ids: list[int]
    events: list[dict[str, Any]]
    events_lost: int = 0
    receipts: list[dict[str, Any]] = msgspec.field(default_factory=list)


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded."""

    info: EngineInfo


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Nothing happened, and the loop turns."""

    stats: EngineStats


class StepReport(msgspec.Struct, tag=True, frozen=True):
    """Everything one step made, in one message. `started`: requests that left the queue."""

    stats: EngineStats
    deltas: list[Delta] = msgspec.field(default_factory=list)
    finished: list[Finished] = msgspec.field(default_factory=list)
    started: list[str] = msgspec.field(default_factory=list)


class StateAnswer(msgspec.Struct, tag=True, frozen=True):
    """What a call on the state store returned, or why it was refused; `receipt` beside an id or a refusal."""

    call_id: int
    result: Any = None
    error: ErrorInfo | None = None
    receipt: dict[str, Any] | None = None


class Died(msgspec.Struct, tag=True, frozen=True):
    """The engine could not start, or takes no more requests. Nothing follows but heartbeats."""

    error: ErrorInfo


ToEngine = Submit | Abort | Watch | StateCall | Stop
FromEngine = Ready | Heartbeat | StepReport | StateView | StateAnswer | Died


def delta_of(output: StepOutput) -> Delta:
    """An engine's increment as a message."""
    return Delta(
        output.request_id,
        output.index,
        output.token_ids,
        output.text,
        output.finish_reason,
        output.stop_reason,
        output.logprobs,
    )


def finished_of(final: RequestOutput) -> Finished:
    """An engine's last word on a request as a message."""
    timeline = final.timeline
    terms = {name: value for name, value in timeline.as_dict().items() if name in Timings.__struct_fields__}
    return Finished(
        request_id=final.request_id,
        prompt_tokens=final.prompt_len,
        completion_tokens=sum(len(completion.token_ids) for completion in final.completions),
        longest_completion=max((len(completion.token_ids) for completion in final.completions), default=0),
        cached_tokens=final.cached_tokens,
        template_tokens=final.template_tokens,
        finish_reasons=[completion.finish_reason or "" for completion in final.completions],
        error=None if final.error is None else ErrorInfo.of(final.error),
        timings=msgspec.convert({"arrival_ns": timeline.arrival_ns, **terms}, Timings),
        hit_tokens_by_tier=final.hit_tokens_by_tier,
    )


def terms_of(timeline: Timeline) -> Timings:
    """The terms whose moment has come, of a request that lives."""
    return Timings(
        timeline.arrival_ns,
        timeline.t_queue_ns,
        timeline.t_intake_ns,
        timeline.state_wait_ns,
        timeline.t_schedule_ns,
        timeline.t_prefill_ns,
        timeline.t_return_ns,
        timeline.ttft_ns,
        preemptions=len(timeline.preempted_ns),
    )


def prompt_of(message: Submit) -> list[int] | list[Segment]:
    """The prompt as the engine takes it: by its parts where they have names."""
    ids = message.token_ids
    return [Segment(span.name, ids[span.start : span.end]) for span in message.segments] or ids


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as plain data."""
    return asdict(params)


def params_from_wire(wire: dict[str, Any]) -> SamplingParams:
    """The reverse, checked again. Raises InvalidRequestError."""
    try:
        return SamplingParams(**wire)
    except TypeError as error:
        raise InvalidRequestError(f"Malformed sampling parameters: {error}.", param="params") from error


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as bytes: four of length, then msgpack."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def frame_length(head: bytes) -> int:
    """How many bytes follow these four. Raises ValueError beyond the bound."""
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    return length


def _tree(kind: type[NanoVLLMError]) -> list[type[NanoVLLMError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _tree(child))]
