"""SamplingParams: what one request asks of generation, validated when it is made.

What it is: plain, immutable data. What it knows nothing about: logits, tokenizers,
the engine. Invariant: an instance is valid; what depends on the model (token ids
within the vocabulary) is checked when the request enters the engine.
The first three fields keep the order upstream and the course use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.core.grammar import Grammar
from nanovllm.errors import InvalidRequestError, shown

MAX_N, MAX_LOGPROBS, MAX_STOP, MAX_STOP_BYTES, MAX_STOP_IDS, MAX_LOGIT_BIAS = 16, 20, 4, 256, 128, 300
GREEDY_BELOW = 1e-5  # a temperature under this is a division that overflows: it means argmax


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. temperature 0 is greedy (argmax)."""

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None  # what the text must look like; a mapping of its fields is taken too

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_counts()
        self._freeze_stops()
        self._freeze_logit_bias()
        self._freeze_grammar()

    @property
    def is_greedy(self) -> bool:
        """True where the most likely token is taken and no noise is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """True where the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)

    def _check_counts(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("top_k", 0 if self.top_k == -1 else self.top_k, 0, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        _integer("n", self.n, 1, MAX_N)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens is larger than max_tokens.", param="min_tokens")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false.", param=name)

    def _freeze_stops(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop)
        if len(stops) > MAX_STOP or any(not isinstance(s, str) or not s for s in stops):
            raise InvalidRequestError(f"stop must be at most {MAX_STOP} non-empty strings.", param="stop")
        if any(len(s.encode("utf-8", "replace")) > MAX_STOP_BYTES for s in stops):
            raise InvalidRequestError(f"A stop string may have at most {MAX_STOP_BYTES} bytes.", param="stop")
        ids = _listed("stop_token_ids", self.stop_token_ids)
        if len(ids) > MAX_STOP_IDS:
            raise InvalidRequestError(f"At most {MAX_STOP_IDS} stop_token_ids are allowed.", param="stop_token_ids")
        for token_id in ids:
            _integer("stop_token_ids", token_id, 0, 2**31)
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", ids)

    def _freeze_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids.", param="logit_bias")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, 2**31)
            _number("logit_bias", bias, -100.0, 100.0)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _freeze_grammar(self) -> None:
        given: Any = self.grammar
        if isinstance(given, Mapping):  # as `asdict` writes it
            if not {"kind"} <= given.keys() <= {"kind", "text"}:
                raise InvalidRequestError("A grammar's fields are kind and text.", param="grammar")
            object.__setattr__(self, "grammar", Grammar(**given))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequestError(f"grammar must be a Grammar, not {shown(self.grammar)}.", param="grammar")
        if self.grammar is not None and self.min_tokens:
            raise InvalidRequestError(
                "min_tokens and a grammar exclude each other: the grammar says when a text may end.", param="min_tokens"
            )


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine or not low <= value <= high or (open_low and value == low):  # NaN fails every comparison
        bracket = "(" if open_low else "["
        what = f"a number in {bracket}{low:g}, {high:g}]"
        raise InvalidRequestError(f"{name} must be {what}, not {shown(value)}.", param=name)


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if values is not None and not isinstance(values, list | tuple):
        raise InvalidRequestError(f"{name} must be a list, not {shown(values)}.", param=name)
    return tuple(values or ())


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer in [{low}, {high}], not {shown(value)}.", param=name)
