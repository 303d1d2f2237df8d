"""What leaves the process when a sequence moves: the resume view and the worker view.

The *resume view* (`Sequence.__getstate__`) lets another engine go on with the
request. It is plain data, holds no physical block ids, and says that nothing is
cached: KV is recomputed, or found again by digest. The *worker view* is the other half:
physical block ids and counters of the step in flight, no sampling state. `ExecBatch`
carries the same for a whole batch as arrays; the view shows it for one sequence.

Resume view, field by field:
| field             | when it is lost                              | what goes silently wrong when it is false |
|-------------------|----------------------------------------------|-------------------------------------------|
| token_ids         | cannot continue: nothing to compute          | another text is continued                 |
| num_prompt_tokens | prompt taken for completion: length unknown  | the completion starts and ends elsewhere  |
| sampling_params   | cannot continue: no rule to choose or to end | other tokens are chosen, another end      |
| seed              | cannot continue a sampled request            | sampled text differs from the unmoved run |
| block_size        | block arithmetic impossible                  | num_blocks is wrong; `resume` refuses it   |
| request_id        | the answer reaches nobody                    | the answer reaches somebody else          |
| index             | the n samples cannot be told apart           | one sample is returned in another's place |
| namespace         | cannot be matched: wrong root digest         | KV of another tenant would match          |
| priority          | falls back to arrival order                  | overtakes or is overtaken                 |
| prefill_only      | would start to decode                        | emits text nobody asked for, or never any |
| segments          | spans are unknown to the state plane         | reuse is accounted to the wrong segment   |
| num_preemptions   | epoch restarts at 0                          | events of two lives share an epoch        |

`session_id` stays behind: it says what this engine keeps, and the other one has its own.
Worker view: token_ids (only those to compute), start, block_table, num_scheduled_tokens;
a lost one stops the step, a false one reads or writes another sequence's KV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanovllm.core.sampling_params import MAX_N, SamplingParams
from nanovllm.core.segments import SegmentSpan
from nanovllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence

RESUME_FIELDS = (
    "token_ids",
    "num_prompt_tokens",
    "sampling_params",
    "seed",
    "block_size",
    "request_id",
    "index",
    "namespace",
    "priority",
    "prefill_only",
    "segments",
    "num_preemptions",
)


def resume_view(seq: Sequence) -> dict[str, Any]:
    """Everything another engine needs to go on, as plain data that msgpack can carry."""
    state: dict[str, Any] = {name: getattr(seq, name) for name in RESUME_FIELDS}
    state["token_ids"] = list(seq.token_ids)
    params = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(seq.sampling_params).items()}
    bias = seq.sampling_params.logit_bias
    params["logit_bias"] = [list(pair) for pair in bias.items()]  # formats disagree on integer keys
    state["sampling_params"] = params
    state["segments"] = [[span.name, span.start, span.end] for span in seq.segments]
    state["num_cached_tokens"] = 0
    return state


def restore(seq: Sequence, state: dict[str, Any]) -> None:
    """Fill `seq` from a resume view. Raises InvalidRequestError naming a field that is missing or malformed."""
    if not isinstance(state, dict):
        raise InvalidRequestError("A sequence state is a mapping.", param="state")
    missing = [name for name in RESUME_FIELDS if name not in state]
    if missing:
        raise InvalidRequestError(f"The sequence state lacks {missing[0]!r}.", param=missing[0])
    values = {name: state[name] for name in RESUME_FIELDS}
    for name, is_sound in SOUND.items():
        if not is_sound(values[name]):
            raise InvalidRequestError(f"{name} of the sequence state is malformed.", param=name)
    values["sampling_params"] = _restored_params(values["sampling_params"])
    values["segments"] = tuple(SegmentSpan(*span) for span in values["segments"])
    type(seq).__init__(seq, **values)


def _restored_params(params: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**{**params, "logit_bias": dict(params.get("logit_bias", ()))})
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(
            "sampling_params of the sequence state is malformed.", param="sampling_params"
        ) from error


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value < high


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and [type(part) for part in value] == [str, int, int]


SOUND: dict[str, Callable[[Any], bool]] = {
    "token_ids": lambda value: isinstance(value, list),  # the ids themselves are checked as those of any prompt
    "num_prompt_tokens": _is_whole(1, 2**31),
    "sampling_params": lambda value: isinstance(value, dict),
    "seed": _is_whole(0, 2**64),
    "block_size": _is_whole(1, 2**31),
    "request_id": lambda value: isinstance(value, str) and value != "",
    "index": _is_whole(0, MAX_N),
    "namespace": lambda value: isinstance(value, str),
    "priority": _is_whole(-(2**63), 2**63),
    "prefill_only": lambda value: isinstance(value, bool),
    "segments": lambda value: isinstance(value, list) and all(map(_is_span, value)),
    "num_preemptions": _is_whole(0, 2**31),
}


def worker_view(seq: Sequence) -> dict[str, Any]:
    """What a runner needs for the step in flight: the tokens to compute and where their KV lies."""
    start = seq.num_cached_tokens
    return {
        "request_id": seq.request_id,
        "token_ids": seq.token_ids[start : start + seq.num_scheduled_tokens],
        "start": start,
        "num_scheduled_tokens": seq.num_scheduled_tokens,
        "block_table": list(seq.block_table),
    }
