"""SequenceFactory: a request's parameters, or a state from elsewhere, become sequences of this engine.

What it is: the one place where a `Sequence` is made. What it knows nothing about:
queues, blocks, text. Invariant: what it returns carries everything that belongs to
this engine (arrival number, end tokens, limits, root digest) and holds nothing yet.
"""

from __future__ import annotations

from typing import Any

from nanovllm.core.digest import root_digest
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.timeline import Timeline
from nanovllm.engine.parts import EngineParts
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidRequestError


class SequenceFactory:
    """Makes the sequences of one engine, and numbers them."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._block_size = parts.scheduler.block_size
        self._num_seqs = 0

    def new(
        self, token_ids: list[int], params: SamplingParams, request_id: str, arrival_ns: int, **labels: Any
    ) -> list[Sequence]:
        """The n samples of a new request. `labels` are fields of `Sequence`, and `cache_salt`."""
        return [self._new(token_ids, params, request_id, index, arrival_ns, **labels) for index in range(params.n)]

    def restored(self, state: dict[str, Any], cache_salt: str) -> Sequence:
        """A sequence that another engine started. Raises InvalidRequestError where `state` cannot go on here."""
        seq = Sequence.__new__(Sequence)
        seq.__setstate__(state)
        intake = self._parts.intake
        intake.check(intake.tokenize(seq.token_ids)[0], seq.sampling_params)
        if seq.block_size != self._block_size:
            raise InvalidRequestError("The sequence comes from an engine with another block_size.", param="block_size")
        self._adopt(seq, self._parts.clock.now_ns(), cache_salt)
        if not 0 < seq.num_prompt_tokens <= seq.num_tokens < seq.max_total_tokens:
            raise InvalidRequestError("The sequence is complete, or its counts disagree.", param="num_prompt_tokens")
        return seq

    def _new(
        self,
        token_ids: list[int],
        params: SamplingParams,
        request_id: str,
        index: int,
        arrival_ns: int,
        *,
        cache_salt: str,
        **labels: Any,
    ) -> Sequence:
        seed = params.seed if params.seed is not None else self._parts.seed + (self._num_seqs << 8)
        seed = (seed + index) % 2**64
        seq = Sequence(token_ids, params, self._block_size, request_id, index=index, seed=seed, **labels)
        self._adopt(seq, arrival_ns, cache_salt)
        return seq

    def _adopt(self, seq: Sequence, arrival_ns: int, cache_salt: str) -> None:
        """Give a sequence what belongs to this engine rather than to the request."""
        self._num_seqs += 1
        params, limit = seq.sampling_params, self._parts.intake.max_model_len
        seq.seq_id = self._num_seqs
        seq.max_total_tokens = min(seq.num_prompt_tokens + (params.max_tokens or limit), limit)
        seq.eos_token_ids = () if params.ignore_eos else self._parts.eos_token_ids
        seq.timeline = Timeline(arrival_ns, label=self._parts.label)
        seq.root_digest = root_digest({**self._parts.identity, "namespace": seq.namespace, "salt": cache_salt})
