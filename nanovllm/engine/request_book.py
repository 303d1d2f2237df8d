"""RequestBook: which sequences belong to which request, and what their callers have seen.

What it is: the requests that are live, their growing outputs, and the record that
is handed over at the end. What it knows nothing about: scheduling, blocks, time.
Invariant: a request is forgotten when the last increment of its last sample is taken;
nothing of it lingers in the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nanovllm.engine.detokenizer import Decoder, PieceMemory
from nanovllm.engine.faults import OnBehalfOf
from nanovllm.engine.grammar import CompiledGrammar, Mask
from nanovllm.engine.outputs import RequestOutput, SequenceOutput, StepOutput, TokenLogprobs
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import NanoVLLMError


@dataclass
class Request:
    """A request's n sequences with their outputs, and what went wrong if something did."""

    outputs: list[SequenceOutput]
    template_tokens: int | None = None
    error: NanoVLLMError | None = None


class RequestBook:
    """The live requests of one engine."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = PieceMemory(tokenizer)
        self._requests: dict[str, Request] = {}
        self._outputs: dict[Sequence, SequenceOutput] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    @property
    def request_ids(self) -> list[str]:
        """Ids of the live requests."""
        return list(self._requests)

    def open(
        self,
        request_id: str,
        seqs: list[Sequence],
        template_tokens: int | None,
        grammars: Mapping[Sequence, CompiledGrammar],
    ) -> None:
        """Take a new request in; `grammars` are those of the sequences that have one."""
        outputs = {seq: SequenceOutput(seq, self._tokenizer, grammars.get(seq)) for seq in seqs}
        self._requests[request_id] = Request(list(outputs.values()), template_tokens)
        self._outputs |= outputs

    def sequences(self, request_id: str) -> list[Sequence]:
        """The sequences of a request that have not ended; none if it is unknown."""
        request = self._requests.get(request_id)
        return [out.seq for out in request.outputs if not out.seq.is_finished] if request else []

    def masks(self, seqs: Iterable[Sequence]) -> dict[Sequence, Mask]:
        """Which tokens may come next, for those of `seqs` that have a grammar. Raises SequenceFault."""
        masks = {}
        for seq in seqs:
            constraint = self._outputs[seq].constraint
            if constraint is not None:
                with OnBehalfOf(seq, "grammar"):
                    masks[seq] = constraint.mask()
        return masks

    def add_logprobs(self, seq: Sequence, logprobs: TokenLogprobs) -> None:
        """Keep the log-probabilities of the token that `finish_check` takes in next."""
        self._outputs[seq].add_logprobs(logprobs)

    def finish_check(self, seq: Sequence, token_id: int) -> str | None:
        """Turn a sampled token into text; the finish_reason if it is the sequence's last."""
        return self._outputs[seq].finish_check(token_id)

    def note_failure(self, seq: Sequence, error: NanoVLLMError) -> None:
        """The request of `seq` will be handed over with this error."""
        self._requests[seq.request_id].error = error

    def forget(self, request_id: str) -> None:
        """Undo `open`."""
        for output in self._requests.pop(request_id).outputs:
            del self._outputs[output.seq]

    def give_up(self, seq: Sequence, error: NanoVLLMError) -> StepOutput:
        """The last increment of an ended sequence whose text cannot be made any more; what was taken in stays."""
        self.note_failure(seq, error)
        completion = self._outputs[seq].completion
        completion.finish_reason = "error"
        return StepOutput(seq.request_id, seq.index, [], "", "error", final=self._close(seq))

    def take(self, seq: Sequence) -> StepOutput | None:
        """What the caller has not seen of `seq` yet; None where that is nothing."""
        output = self._outputs[seq]
        if seq.is_finished:
            output.finish(seq.finish_reason or "stop")
        tokens, text, logprobs = output.take()
        if not tokens and not seq.is_finished:
            return None
        final = self._close(seq) if seq.is_finished else None
        reason, stop_reason = seq.finish_reason, output.completion.stop_reason
        return StepOutput(seq.request_id, seq.index, tokens, text, reason, logprobs, final, stop_reason)

    def _close(self, seq: Sequence) -> RequestOutput | None:
        """The whole request, if `seq` was the last of it to be handed over."""
        del self._outputs[seq]
        request = self._requests[seq.request_id]
        if any(output.seq in self._outputs for output in request.outputs):
            return None
        del self._requests[seq.request_id]
        first = request.outputs[0].seq
        return RequestOutput(
            request_id=seq.request_id,
            prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
            cached_tokens=first.num_hit_tokens,
            potential_cached_tokens=first.num_potential_hit_tokens,
            template_tokens=request.template_tokens,
            segments=first.segments,
            completions=[output.completion for output in request.outputs],
            error=request.error,
        )
