"""POST /v1/chat/completions: a conversation in, the assistant's next message out.

What it is: the endpoint, from body to `Answer`. What it knows nothing about: what the
fields mean (chat_order.py), how an answer is written (chat_answer.py) or sent (answer.py).
"""

from __future__ import annotations

from starlette.requests import Request

from nanovllm.serve.answer import Answer
from nanovllm.serve.chat_answer import ChatStream, ChatWhole, Head
from nanovllm.serve.chat_order import asked_of
from nanovllm.serve.knowledge import prompt_of
from nanovllm.serve.protocol import ChatRequest
from nanovllm.serve.reception import decoded, parts_of
from nanovllm.serve.session_hint import course_of, session_of


async def chat(request: Request) -> Answer:
    """The answer, to be called by whoever sends it. Raises NanoVLLMError."""
    services, ticket = parts_of(request)
    body = await decoded(request, services, ChatRequest)
    session, asked = session_of(request, body), asked_of(body, services)
    prompt = await prompt_of(services, ticket.tenant, asked.chat, body.knowledge)
    params, streaming = asked.params, asked.streaming
    running = len(prompt.token_ids) if streaming.is_running else 0
    head = Head(
        asked.model, params.n, asked.use, services.engine.tokenizer, params.logprobs, streaming.has_usage, running
    )
    rendering = ChatStream(head) if streaming.is_stream else ChatWhole(head)
    order = asked.order(prompt, session)
    return Answer(services, ticket, order, rendering, streaming.is_stream, course_of(services, ticket, order))
