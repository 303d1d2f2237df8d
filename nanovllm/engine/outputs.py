"""What callers get: increments after each step, and the whole request at its end.

What it is: the output records and the processor that turns sampled tokens into text
and decides when a sequence is complete. What it knows nothing about: blocks,
batches, HTTP. Invariant: a sequence's increments concatenate to its final text and
token ids, and its last one alone has a finish_reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.core.segments import SegmentSpan
from nanovllm.core.timeline import Timeline
from nanovllm.engine.detokenizer import Decoder, IncrementalDetokenizer, StopFilter
from nanovllm.engine.grammar import CompiledGrammar
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidRequestError, NanoVLLMError

TokenLogprobs = list[tuple[int, float]]


@dataclass
class Completion:
    """One of a request's n samples. finish_reason: stop, length, prefilled, abort or error."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token id that matched
    logprobs: list[TokenLogprobs] | None = None  # per token: the chosen one first, then the top ones
    timeline: Timeline = field(default_factory=lambda: Timeline(arrival_ns=0))


@dataclass
class RequestOutput:
    """A finished request. `output["text"]` works as well as `output.text`, of the first sample."""

    request_id: str
    prompt_token_ids: list[int]
    cached_tokens: int
    potential_cached_tokens: int
    template_tokens: int | None
    segments: tuple[SegmentSpan, ...]
    completions: list[Completion]
    error: NanoVLLMError | None = None

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt as it entered the engine, template included."""
        return len(self.prompt_token_ids)

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first sample's tokens."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """The first sample's finish_reason."""
        return self.completions[0].finish_reason

    @property
    def timeline(self) -> Timeline:
        """The first sample's timeline."""
        return self.completions[0].timeline

    @property
    def hit_tokens_by_tier(self) -> dict[str, int]:
        """Where the reused prefix lay: device, host, disk, remote; the sum is `cached_tokens`."""
        return self.timeline.hit_tokens_by_tier

    def __getitem__(self, key: str) -> object:
        if key not in ("text", "token_ids", "finish_reason", "prompt_len", "cached_tokens"):
            raise KeyError(key)
        return getattr(self, key)


@dataclass(slots=True)
class StepOutput:
    """One sequence's increment. `final` comes with the last increment of the request's last sample."""

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    final: RequestOutput | None = None
    stop_reason: str | int | None = None  # what matched, where finish_reason is stop


class SequenceOutput:
    """The text of one sequence while it grows, and its place in its grammar if it has one."""

    def __init__(self, seq: Sequence, tokenizer: Decoder, grammar: CompiledGrammar | None = None) -> None:
        params = seq.sampling_params
        self.seq = seq
        self.completion = Completion(seq.index, timeline=seq.timeline)
        self.completion.logprobs = [] if params.logprobs is not None else None
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopFilter(params.stop, include_stop=params.include_stop_str_in_output)
        self.constraint = grammar.start() if grammar is not None else None
        for token_id in seq.completion_token_ids:  # a resumed sequence: its earlier tokens were shown elsewhere
            if self.constraint is not None and not self.constraint.allows(token_id):
                raise InvalidRequestError("The sequence's tokens do not fit its grammar.", param="grammar")
            self._append(token_id)
        if self.constraint is not None and self.constraint.is_complete:
            raise InvalidRequestError("The sequence's grammar is complete already.", param="grammar")
        self._shown_text, self._shown_tokens = len(self.completion.text), len(self.completion.token_ids)

    def finish_check(self, token_id: int) -> str | None:
        """Take in a sampled token; the finish_reason if it is the last."""
        seq, params = self.seq, self.seq.sampling_params
        self._append(token_id)
        if token_id in seq.eos_token_ids or token_id in params.stop_token_ids:
            self.completion.stop_reason = token_id if token_id in params.stop_token_ids else None
            return "stop"
        if self._stops.matched is not None:
            self.completion.stop_reason = self._stops.matched
            return "stop"
        if self.constraint is not None and self.constraint.is_complete:
            return "stop"
        return "length" if seq.num_tokens >= seq.max_total_tokens else None

    def add_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Keep the log-probabilities of the token that `finish_check` is about to take in."""
        if self.completion.logprobs is not None:
            self.completion.logprobs.append(logprobs)

    def finish(self, reason: str) -> None:
        """No more tokens: show what was held back."""
        self.completion.text += self._stops.add(self._detokenizer.flush()) + self._stops.flush()
        self.completion.finish_reason = reason

    def take(self) -> tuple[list[int], str, list[TokenLogprobs] | None]:
        """Tokens, text and log-probabilities since the last call."""
        tokens, text = self.completion.token_ids[self._shown_tokens :], self.completion.text[self._shown_text :]
        logprobs = self.completion.logprobs and self.completion.logprobs[-len(tokens) :] if tokens else None
        self._shown_tokens, self._shown_text = len(self.completion.token_ids), len(self.completion.text)
        return tokens, text, logprobs

    def _append(self, token_id: int) -> None:
        self.completion.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.accept(token_id)
        text = self._detokenizer.add(token_id)
        if len(self.completion.token_ids) <= self.seq.sampling_params.min_tokens:
            self.completion.text += text  # a stop string ends nothing before min_tokens is reached
        else:
            self.completion.text += self._stops.add(text)
