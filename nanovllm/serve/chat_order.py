"""A chat request, understood: what is to be rendered, with which tools, sampled how.

What it is: the one way from a `ChatRequest` to an `Order`, for every endpoint that answers a conversation. What
it knows nothing about: where the messages came from, token ids, how answers are written. Invariant: everything a
client can get wrong is refused before the engine hears of the request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.answer import Order, Prompt
from nanovllm.serve.constraints import blamed, grammar_of
from nanovllm.serve.context import Services
from nanovllm.serve.conversation import Conversation, conversation, template_variables
from nanovllm.serve.fields import Streaming, check_model, priority_of, sampling_params, streaming_of
from nanovllm.serve.protocol import ChatRequest
from nanovllm.serve.tools import ToolUse, tool_use


@dataclass(frozen=True)
class Asked:
    """What a chat request asks for."""

    model: str  # as the client called it
    chat: Conversation
    use: ToolUse
    params: SamplingParams
    streaming: Streaming
    priority: int
    cache_salt: str
    grammar_param: str

    def order(self, prompt: Prompt, session: str = "") -> Order:
        """What is submitted, once the conversation has token ids."""
        return Order([prompt], self.params, self.priority, self.cache_salt, self.model, self.grammar_param, session)


def asked_of(body: ChatRequest, services: Services) -> Asked:
    """Raises NanoVLLMError, naming the field."""
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
    chat = _conversation(body, use, template, variables)
    blame = blamed(use, body.response_format)
    return Asked(name, chat, use, params, streaming, priority, body.cache_salt or "", blame)


def check_messages(body: ChatRequest, services: Services) -> None:
    """Raise InvalidRequestError for what the types do not say."""
    if len(body.messages) > services.limits.messages:
        raise InvalidRequestError(f"At most {services.limits.messages} messages are allowed.", param="messages")
    if body.continue_final_message:
        raise UnsupportedParameterError("continue_final_message is not supported.", param="continue_final_message")
    if body.store:
        raise UnsupportedParameterError(
            "Chat completions are not stored.", param="store", hint="POST /v1/responses stores its answers."
        )


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
