"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, and back.

What it is: vLLM's two endpoints. What it knows nothing about: the engine's queue. Invariant:
/tokenize of a conversation gives the ids that a chat completion would compute.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.errors import InvalidRequestError, UnsupportedParameterError
from nanovllm.serve.context import Services
from nanovllm.serve.conversation import conversation, template_variables
from nanovllm.serve.fields import check_model, check_token_ids
from nanovllm.serve.protocol import DetokenizeRequest, TokenizeRequest
from nanovllm.serve.reception import decoded, encode_chat, encode_text, in_pool, parts_of
from nanovllm.serve.tools import check_tools, style_of


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or a conversation."""
    services, _ = parts_of(request)
    body = await decoded(request, services, TokenizeRequest)
    check_model(body.model, services)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give prompt or messages, one of them.", param="prompt")
    ids = await (_of_prompt(body, services) if body.messages is None else _of_messages(body, services))
    found: dict[str, Any] = {"count": len(ids), "max_model_len": services.engine.info.max_model_len, "tokens": ids}
    tokenizer = services.engine.tokenizer
    found["token_strs"] = [tokenizer.id_to_token(i) or "" for i in ids] if body.return_token_strs else None
    return Response(msgspec.json.encode(found), media_type="application/json")


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    services, _ = parts_of(request)
    body = await decoded(request, services, DetokenizeRequest)
    check_model(body.model, services)
    check_token_ids(body.tokens, services.engine.info.vocab_size, "tokens")
    work = partial(services.engine.tokenizer.decode, body.tokens, skip_special_tokens=False)
    text = await in_pool(services.pool, work)
    return Response(msgspec.json.encode({"prompt": text}), media_type="application/json")


async def _of_prompt(body: TokenizeRequest, services: Services) -> list[int]:
    for name in ("add_generation_prompt", "chat_template_kwargs", "tools", "continue_final_message"):
        if getattr(body, name):
            raise InvalidRequestError(f"{name} needs messages.", param=name)
    return await encode_text(services, body.prompt or "", add_special_tokens=body.add_special_tokens is not False)


async def _of_messages(body: TokenizeRequest, services: Services) -> list[int]:
    if body.continue_final_message or body.add_special_tokens:
        param = "add_special_tokens" if body.add_special_tokens else "continue_final_message"
        raise UnsupportedParameterError(f"{param} does not go with messages here.", param=param)
    template = services.engine.tokenizer.chat_template or ""
    check_tools(body.tools or [], services.limits)
    functions = tuple(tool.function for tool in body.tools or [])
    variables = template_variables(body.chat_template_kwargs, None, template)
    add_prompt = body.add_generation_prompt is not False
    chat = conversation(body.messages or [], functions, style_of(template), template, variables, add_prompt)
    ids, _ = await encode_chat(services, chat, is_bounded=False)
    return ids
