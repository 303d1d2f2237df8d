"""What leaves the process when a sequence moves: the resume view and the worker view.

The *resume view* (`Sequence.__getstate__`) lets another engine go on with the
request. It is plain data, holds no physical block ids, and says that nothing is
cached: KV is recomputed, or found again by digest. The *worker view* lets a runner
in another process execute one step: physical block ids and counters, no sampling state.

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

Worker view: token_ids (only those to compute), start, block_table, num_scheduled_tokens;
a lost one stops the step, a false one reads or writes another sequence's KV.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanovllm.core.sampling_params import SamplingParams
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
    """Fill `seq` from a resume view. Raises InvalidRequestError naming a field that is missing."""
    missing = [name for name in RESUME_FIELDS if name not in state]
    if missing:
        raise InvalidRequestError(f"The sequence state lacks {missing[0]!r}.", param=missing[0])
    values = {name: state[name] for name in RESUME_FIELDS}
    params = dict(values["sampling_params"])
    params["logit_bias"] = dict(params.get("logit_bias", ()))
    values["sampling_params"] = SamplingParams(**params)
    values["segments"] = tuple(SegmentSpan(*span) for span in values["segments"])
    type(seq).__init__(seq, **values)


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
