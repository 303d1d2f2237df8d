"""The bodies that this server sends, as types.

What it is: what the OpenAPI document says of answers, and what tests hold them to. What
it knows nothing about: how they are written; the answers themselves are rendered by hand
(chat_answer.py, text_answer.py), for speed. Invariant: every body sent decodes as one of these.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

ChatEnding = Literal["stop", "length", "tool_calls"]


class ErrorBody(Struct, forbid_unknown_fields=True):
    """`param` names the field at fault; `code` is stable."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(Struct, forbid_unknown_fields=True):
    """Every failure's body."""

    error: ErrorBody


class PromptDetails(Struct, forbid_unknown_fields=True):
    """How many prompt tokens were not computed again."""

    cached_tokens: int


class OwnUsage(Struct, forbid_unknown_fields=True):
    """Where the cached tokens lay: `device`, `host`, `disk`, `remote`."""

    hit_tokens_by_tier: dict[str, int]


class Usage(Struct, forbid_unknown_fields=True):
    """Tokens of all prompts and samples; `nanovllm` is this server's own."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    nanovllm: OwnUsage | None = None


class TokenLogprob(Struct, forbid_unknown_fields=True):
    """One token and how likely it was; `bytes` joins where a character has several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(Struct, forbid_unknown_fields=True):
    """The chosen token and the most likely ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct, forbid_unknown_fields=True):
    """One entry per token."""

    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(Struct, forbid_unknown_fields=True):
    """`arguments` is a JSON object as text."""

    name: str
    arguments: str


class CallReply(Struct, forbid_unknown_fields=True):
    """A call the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class CallDelta(Struct, forbid_unknown_fields=True):
    """A call within a stream, whole at once."""

    index: int
    id: str
    type: Literal["function"]
    function: CalledFunction


class MessageReply(Struct, forbid_unknown_fields=True):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CallReply] | None = None


class ChatChoice(Struct, forbid_unknown_fields=True):
    """One of n answers."""

    index: int
    message: MessageReply
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnding


class ChatReply(Struct, forbid_unknown_fields=True):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaReply(Struct, forbid_unknown_fields=True):
    """What a chunk adds to its choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(Struct, forbid_unknown_fields=True):
    """The choice a chunk belongs to."""

    index: int
    delta: DeltaReply
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnding | None


class ChatChunk(Struct, forbid_unknown_fields=True):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobsReply(Struct, forbid_unknown_fields=True):
    """One entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(Struct, forbid_unknown_fields=True):
    """One of n continuations of one prompt."""

    index: int
    text: str
    logprobs: TextLogprobsReply | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None


class TextReply(Struct, forbid_unknown_fields=True):
    """A text completion, or one event of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class TokenizeReply(Struct, forbid_unknown_fields=True):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(Struct, forbid_unknown_fields=True):
    """The tokens' text."""

    prompt: str


class ModelReply(Struct, forbid_unknown_fields=True):
    """A name the model answers to."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelsReply(Struct, forbid_unknown_fields=True):
    """All of them."""

    object: Literal["list"]
    data: list[ModelReply]


class StatusReply(Struct, forbid_unknown_fields=True):
    """How the server is."""

    status: str


class VersionReply(Struct, forbid_unknown_fields=True):
    """The package's version."""

    version: str
