"""From a request's fields to sampling parameters: each is honoured, or refused by name.

What it is: the meaning of the fields that both kinds of completion share. What it knows
nothing about: prompts, rendering. Invariants: a field that is given reaches the engine or
is in `HINTS`; defaults are the request's, else the model's, else OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.core.grammar import Grammar
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import InvalidRequestError, ModelNotFoundError, UnsupportedParameterError
from nanovllm.serve.config import Limits
from nanovllm.serve.context import Services
from nanovllm.serve.protocol import ChatRequest, CompletionRequest, Sampling

MAX_SEQUENCES = 128  # prompts times n
COMPLETION_TOKENS = 16  # OpenAI's default for text completions; a chat's is what the context holds
_DIRECT = (
    "min_tokens",
    "ignore_eos",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "stop",
)
_SEEDS = 2**64
_TOO_LARGE = {  # what a server's limits may set lower than the protocol does
    "stop": "stop",
    "stop_token_ids": "stop_ids",
    "logit_bias": "logit_bias",
    "top_logprobs": "logprobs",
    "logprobs": "logprobs",
    "n": "n",
}


@dataclass(frozen=True)
class Streaming:
    """Whether and how the answer is streamed."""

    is_stream: bool
    has_usage: bool
    is_running: bool = False  # the usage so far in every chunk


def served_names(services: Services) -> tuple[str, ...]:
    """What clients may call the model; the first is its name, the others aliases."""
    return services.config.served_model_name or (services.engine.config.model,)


def check_model(model: str | None, services: Services) -> str:
    """The name to answer with. Raises ModelNotFoundError for a model that is not served."""
    names = served_names(services)
    if model is None:
        return names[0]
    if model not in names:
        raise ModelNotFoundError(
            f"The model {model[:100]!r} is not served here.", param="model", hint=f"Served is {names[0]!r}."
        )
    return model


def check_limits(body: Sampling, limits: Limits) -> None:
    """Raise InvalidRequestError where a field exceeds what this server allows."""
    for field, limit in _TOO_LARGE.items():
        value, most = getattr(body, field, None), getattr(limits, limit)
        size = value if isinstance(value, int) else len(value) if isinstance(value, list | dict) else 0
        if size > most:
            raise InvalidRequestError(f"{field} exceeds this server's limit of {most}.", param=field)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if any(len(text.encode()) > limits.stop_bytes for text in stop):
        raise InvalidRequestError(f"A stop string has more than {limits.stop_bytes} bytes.", param="stop")


def streaming_of(body: Sampling) -> Streaming:
    """Raises InvalidRequestError for stream_options without stream."""
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream: true.", param="stream_options")
    has_usage = options is not None and bool(options.include_usage)
    is_running = options is not None and has_usage and bool(options.continuous_usage_stats)
    return Streaming(bool(body.stream), has_usage, is_running)


def sampling_params(
    body: ChatRequest | CompletionRequest,
    services: Services,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
) -> SamplingParams:
    """The request's parameters. Raises InvalidRequestError naming the field."""
    check_limits(body, services.limits)
    given: dict[str, Any] = {name: getattr(body, name) for name in _DIRECT if getattr(body, name) is not None}
    if body.seed is not None:
        if body.seed >= _SEEDS:
            raise InvalidRequestError("seed must be below 2**64.", param="seed")
        given["seed"] = body.seed % _SEEDS
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise InvalidRequestError("min_tokens is larger than max_tokens.", param="min_tokens")
    defaults: Mapping[str, Any] = services.generation_defaults
    if grammar is not None:
        given["grammar"] = grammar
    return SamplingParams(**{**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs})


def priority_of(body: Sampling, services: Services) -> int:
    """Raises UnsupportedParameterError where this server would not heed it."""
    if body.priority and services.engine.config.policy != "priority":
        raise UnsupportedParameterError(
            "priority has no effect on this server.", param="priority", hint="It runs with another --policy."
        )
    return body.priority or 0


def check_sequences(prompts: int, n: int) -> None:
    """Raise InvalidRequestError for a request that fans out too far."""
    if prompts * n > MAX_SEQUENCES:
        raise InvalidRequestError(f"{prompts} prompts times n = {n} is more than {MAX_SEQUENCES}.", param="n")


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequestError for an id that is no token of this model."""
    if ids and max(ids) >= vocab_size:
        raise InvalidRequestError(
            f"{param}: {max(ids)} is no token id of this model; they end at {vocab_size - 1}.", param=param
        )
