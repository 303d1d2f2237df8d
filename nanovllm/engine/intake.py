"""Intake: what a caller hands in becomes token ids, or an error that says what is wrong.

What it is: stage one and two of a request's life, validation and tokenizing. What it
knows nothing about: queues, blocks. Invariant: what passes can run alone to its end:
its prompt and at least one token fit into the model and the pool.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import index
from typing import Protocol, SupportsIndex

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import Segment, SegmentSpan
from nanovllm.errors import ContextLengthError, InvalidRequestError, shown

Prompt = str | Seq[int] | Seq[Segment]


class PromptEncoder(Protocol):
    """The part of a tokenizer this module needs."""

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True)
class Intake:
    """Checks and tokenizes for one engine."""

    tokenizer: PromptEncoder
    vocab_size: int
    max_model_len: int

    def tokenize(self, prompt: Prompt) -> tuple[list[int], tuple[SegmentSpan, ...]]:
        """Token ids, and where the named segments lie if the prompt has any. Raises InvalidRequestError."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), ()
        if not isinstance(prompt, Seq) or isinstance(prompt, bytes):
            raise InvalidRequestError(
                "A prompt is a string, a list of token ids or a list of Segment.",
                param="prompt",
                hint=f"This one is {type(prompt).__name__}.",
            )
        if prompt and all(isinstance(part, Segment) for part in prompt):
            return self._join([part for part in prompt if isinstance(part, Segment)])
        return self._checked_ids(prompt), ()

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        """Raise where the request can never be served: empty, too long, or naming tokens that do not exist."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams, not {type(params).__name__}.", param="sampling_params"
            )
        if not token_ids:
            raise InvalidRequestError("The prompt is empty.", param="prompt", hint="Give at least one token.")
        if len(token_ids) >= self.max_model_len:
            raise ContextLengthError(
                f"The prompt has {len(token_ids)} tokens; at most {self.max_model_len - 1} fit beside one of output.",
                param="prompt",
                hint="Shorten the prompt, or raise max_model_len or kv_memory.",
            )
        if (params.logprobs or 0) > self.vocab_size:
            raise InvalidRequestError(f"logprobs: there are only {self.vocab_size} tokens.", param="logprobs")
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            if any(token_id >= self.vocab_size for token_id in ids):
                raise InvalidRequestError(
                    f"{name} names a token outside the vocabulary of {self.vocab_size}.", param=name
                )

    def _join(self, segments: list[Segment]) -> tuple[list[int], tuple[SegmentSpan, ...]]:
        token_ids: list[int] = []
        spans = []
        for segment in segments:
            start = len(token_ids)
            if isinstance(segment.content, str):
                token_ids += self.tokenizer.encode(segment.content, add_bos=start == 0)
            else:
                token_ids += self._checked_ids(segment.content)
            spans.append(SegmentSpan(segment.name, start, len(token_ids)))
        return token_ids, tuple(spans)

    def _checked_ids(self, ids: object) -> list[int]:
        if not isinstance(ids, Seq):
            raise InvalidRequestError(f"A segment is text or token ids, not {type(ids).__name__}.", param="prompt")
        are_plain = set(map(type, ids)) <= {int}  # then nothing is to be asked of each: 30 ms of 2,400 otherwise
        for token_id in ids:
            if not (are_plain or _is_whole(token_id)) or not 0 <= index(token_id) < self.vocab_size:
                raise InvalidRequestError(
                    f"{shown(token_id)} is no token id of this model: they run from 0 to {self.vocab_size - 1}.",
                    param="prompt",
                )
        return [index(token_id) for token_id in ids]


def _is_whole(number: object) -> bool:
    return isinstance(number, SupportsIndex) and not isinstance(number, bool)  # numpy's integers too


def check_labels(
    request_id: object,
    priority: object,
    namespace: object,
    cache_salt: object,
    session_id: object,
    session_owner: object,
    prefill_only: object,
) -> None:
    """Raise InvalidRequestError unless the labels that a request carries beside its prompt are of their kind."""
    kinds = (
        ("request_id", request_id if request_id is not None else "", str),
        ("priority", priority, int),
        ("namespace", namespace, str),
        ("cache_salt", cache_salt, str),
        ("session_id", session_id, str),
        ("session_owner", session_owner, str),
        ("prefill_only", prefill_only, bool),
    )
    for name, value, kind in kinds:
        if type(value) is not kind:
            raise InvalidRequestError(f"{name} must be {kind.__name__}, not {shown(value)}.", param=name)
