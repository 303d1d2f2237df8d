"""POST /v1/chat/completions: a conversation in, the assistant's next message out.

What it is: the endpoint, from body to `Answer`. What it knows nothing about: how an
answer is written (chat_answer.py) or sent (answer.py). Invariant: everything a client
can get wrong is refused before the engine hears of the request.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.answer import Answer, Order, Prompt
from nanovllm.serve.chat_answer import ChatStream, ChatWhole, Head
from nanovllm.serve.constraints import blamed, grammar_of
from nanovllm.serve.context import Services
from nanovllm.serve.conversation import Conversation, conversation, template_variables
from nanovllm.serve.fields import check_model, priority_of, sampling_params, streaming_of
from nanovllm.serve.protocol import ChatRequest
from nanovllm.serve.reception import decoded, encode_chat, parts_of
from nanovllm.serve.tools import ToolUse, tool_use


async def chat(request: Request) -> Answer:
    """The answer, to be called by whoever sends it. Raises NanoVLLMError."""
    services, ticket = parts_of(request)
    body = await decoded(request, services, ChatRequest)
    name = check_model(body.model, services)
    check_messages(body, services)
    template = services.engine.tokenizer.chat_template or ""
    use = tool_use(body, template, services.limits)
    params = sampling_params(
        body,
        services,
        max_tokens=_max_tokens(body),
        logprobs=_logprobs(body),
        grammar=grammar_of(body.response_format, body.structured_outputs, use, services.limits),
    )
    streaming, priority = streaming_of(body), priority_of(body, services)
    variables = template_variables(body.chat_template_kwargs, body.reasoning_effort, template)
    ids, added = await encode_chat(services, _conversation(body, use, template, variables))
    running = len(ids) if streaming.is_running else 0
    head = Head(name, params.n, use, services.engine.tokenizer, _logprobs(body), streaming.has_usage, running)
    rendering = ChatStream(head) if streaming.is_stream else ChatWhole(head)
    order = Order(
        [Prompt(ids, added)], params, priority, body.cache_salt or "", name, blamed(use, body.response_format)
    )
    return Answer(services, ticket, order, rendering, streaming.is_stream)


def check_messages(body: ChatRequest, services: Services) -> None:
    """Raise InvalidRequestError for what the types do not say."""
    if len(body.messages) > services.limits.messages:
        raise InvalidRequestError(f"At most {services.limits.messages} messages are allowed.", param="messages")
    if body.continue_final_message:
        raise UnsupportedParameterError("continue_final_message is not supported.", param="continue_final_message")
    if body.store:
        raise UnsupportedParameterError("Nothing is stored here.", param="store", hint="Send store: false.")


def _conversation(body: ChatRequest, use: ToolUse, template: str, variables: dict[str, Any]) -> Conversation:
    functions = use.functions if use.is_offered else ()
    return conversation(
        body.messages, functions, use.style, template, variables, body.add_generation_prompt is not False
    )


def _max_tokens(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequestError("max_tokens and max_completion_tokens differ.", param="max_tokens")
    return old if new is None else new


def _logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
