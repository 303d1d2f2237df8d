"""What /v1/responses and /v1/conversations send, as types.

What it is: as replies.py, for stored turns. What it knows nothing about: how they are made. Invariant: every body
sent decodes as one of these.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Status = Literal["in_progress", "completed", "incomplete", "failed"]
CacheReason = Literal["model_changed", "tools_changed", "reasoning_effort_changed", "input_changed"]
MissReason = CacheReason | Literal["knowledge_changed", "item_deleted", "history_rewritten", "kv_not_kept"]


class PartReply(Struct, forbid_unknown_fields=True):
    """A text: the model's, or one that was said to it."""

    type: Literal["output_text", "input_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ItemReply(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message, a call or a call's result."""

    id: str
    type: Literal["message", "function_call", "function_call_output"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: list[PartReply] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None


class ItemsReply(Struct, forbid_unknown_fields=True):
    """A page of items."""

    object: Literal["list"]
    data: list[ItemReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputDetails(Struct, forbid_unknown_fields=True):
    """Tokens that were found, and those whose KV was computed and can be found from now on."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Struct, forbid_unknown_fields=True):
    """There is no hidden reasoning."""

    reasoning_tokens: int


class TurnUsage(Struct, kw_only=True, forbid_unknown_fields=True):
    """This server's own: the tiers of the cached tokens; and, of a turn that continues one, what it could reuse.

    `reusable_tokens`: that its prompt and the stored tokens begin with; `miss_reason`: why it found less, or was
    other than what was stored; `changed`: fields that differ from the turn before.
    """

    hit_tokens_by_tier: dict[str, int]
    reusable_tokens: int | None = None
    miss_reason: MissReason | None = None
    changed: list[str] | None = None


class ResponseUsage(Struct, forbid_unknown_fields=True):
    """Tokens of the turn."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    nanovllm: TurnUsage


class CacheDiagnostics(Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's words on the turn before: a hit, a miss with its reason, or that nothing can be said."""

    type: Literal["cache_hit", "cache_miss", "unavailable"]
    reason: CacheReason | None = None
    cache_missed_tokens: int | None = None
    comparison_reusable_tokens: int | None = None


class IdReply(Struct, forbid_unknown_fields=True):
    """A conversation by its id."""

    id: str


class ReasonReply(Struct, forbid_unknown_fields=True):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class FailureReply(Struct, forbid_unknown_fields=True):
    """Why a response failed."""

    code: str
    message: str


class ResponseReply(Struct, kw_only=True, forbid_unknown_fields=True):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: Literal[False]
    error: FailureReply | None
    incomplete_details: ReasonReply | None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    output: list[ItemReply]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: IdReply | None
    prompt_cache_key: str | None
    prompt_cache_diagnostics: CacheDiagnostics | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(Struct, kw_only=True, forbid_unknown_fields=True):
    """One event of a stream; which fields it has follows from its type."""

    type: str
    sequence_number: int
    response: ResponseReply | None = None
    item: ItemReply | None = None
    part: PartReply | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[Any] | None = None
    name: str | None = None
    arguments: str | None = None
    error: dict[str, str | None] | None = None
    message: str | None = None
    code: str | None = None
    param: str | None = None


class DeletedReply(Struct, forbid_unknown_fields=True):
    """What was there is there no more."""

    id: str
    object: Literal["response.deleted", "conversation.deleted"]
    deleted: Literal[True]


class ConversationReply(Struct, forbid_unknown_fields=True):
    """A conversation, without its items; `name` is this server's own."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]
    name: str | None


class ConversationsReply(Struct, forbid_unknown_fields=True):
    """The conversation of a name, or none."""

    object: Literal["list"]
    data: list[ConversationReply]
    first_id: str | None
    last_id: str | None
    has_more: bool
