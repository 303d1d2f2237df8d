"""POST /v1/completions: texts or token ids in, their continuations out.

What it is: the endpoint, from body to `Answer`. What it knows nothing about: how an
answer is written (text_answer.py) or sent. Invariant: choices are numbered prompt by
prompt, n of them each.
"""

from __future__ import annotations

from starlette.requests import Request

from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.answer import Answer, Order, Prompt
from nanovllm.serve.constraints import blamed, grammar_of
from nanovllm.serve.context import Services
from nanovllm.serve.fields import (
    COMPLETION_TOKENS,
    check_model,
    check_sequences,
    check_token_ids,
    priority_of,
    sampling_params,
    streaming_of,
)
from nanovllm.serve.protocol import CompletionRequest
from nanovllm.serve.reception import check_length, decoded, encode_text, parts_of
from nanovllm.serve.session_hint import course_of, session_of
from nanovllm.serve.text_answer import Head, TextStream, TextWhole


async def completions(request: Request) -> Answer:
    """The answer, to be called by whoever sends it. Raises NanoVLLMError."""
    services, ticket = parts_of(request)
    body = await decoded(request, services, CompletionRequest)
    name = check_model(body.model, services)
    _check(body)
    given = prompts_of(body.prompt, services)
    check_sequences(len(given), body.n or 1)
    params = sampling_params(
        body,
        services,
        max_tokens=COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        grammar=grammar_of(body.response_format, body.structured_outputs, None, services.limits),
    )
    streaming, priority = streaming_of(body), priority_of(body, services)
    prompts = [Prompt(await _encoded(prompt, services)) for prompt in given]
    tokenizer = services.engine.tokenizer
    echoes = [_echo(prompt, services) if body.echo else "" for prompt in given]
    running = [len(prompt.token_ids) for prompt in prompts] if streaming.is_running else []
    head = Head(name, params.n, echoes, tokenizer, body.logprobs, streaming.has_usage, running)
    rendering = TextStream(head) if streaming.is_stream else TextWhole(head)
    blame, session = blamed(None, body.response_format), session_of(request, body)
    order = Order(prompts, params, priority, body.cache_salt or "", name, blame, session)
    return Answer(services, ticket, order, rendering, streaming.is_stream, course_of(services, ticket, order))


def prompts_of(prompt: str | list[str | int | list[int]], services: Services) -> list[str | list[int]]:
    """The prompts of one request. Raises InvalidRequestError."""
    prompts = _listed(prompt)
    if len(prompts) > services.limits.prompts:
        raise InvalidRequestError(f"At most {services.limits.prompts} prompts are allowed.", param="prompt")
    return prompts


def _listed(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [part for part in prompt if isinstance(part, int)]
    texts = [part for part in prompt if isinstance(part, str)]
    lists = [part for part in prompt if isinstance(part, list)]
    if len(prompt) not in (len(ids), len(texts), len(lists)):
        raise InvalidRequestError("prompt mixes texts, token ids and lists.", param="prompt")
    return [ids] if ids else [*texts, *lists]


def _check(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise UnsupportedParameterError("best_of must equal n: all samples are returned.", param="best_of")
    if body.echo and body.logprobs is not None:
        raise UnsupportedParameterError(
            "echo does not go with logprobs: prompt tokens have none here.", param="logprobs", hint="Leave one out."
        )


async def _encoded(prompt: str | list[int], services: Services) -> list[int]:
    if isinstance(prompt, str):
        ids = await encode_text(services, prompt)
    else:
        ids = prompt
        check_token_ids(ids, services.engine.info.vocab_size, "prompt")
    check_length(len(ids), services, "prompt")
    return ids


def _echo(prompt: str | list[int], services: Services) -> str:
    return prompt if isinstance(prompt, str) else services.engine.tokenizer.decode(prompt, skip_special_tokens=False)
