"""The bodies of /v1/responses and /v1/conversations: OpenAI's shapes, strictly.

What it is: types, from which decoding and the OpenAPI document follow, as in protocol.py. What it knows nothing
about: the engine, what is stored. Invariants: those of protocol.py; an item has one shape for all its types,
because clients leave `type` out: items.py says which fields each type needs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from nanovllm.serve.protocol import (
    Count,
    CountOrZero,
    Documents,
    Hinted,
    JsonObjectFormat,
    Label,
    Name,
    Penalty,
    Schema,
    Share,
    TextFormat,
)

MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512
MAX_ITEMS = 20  # that one call may add to a conversation
MAX_PARTS = 1024  # of one item
MetadataKey = Annotated[str, Meta(max_length=MAX_KEY)]
MetadataValue = Annotated[str, Meta(max_length=MAX_VALUE)]
UserMetadata = Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=MAX_METADATA)]
SessionLabel = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f@]+$")]


class InputText(Struct, tag_field="type", tag="input_text", forbid_unknown_fields=True):
    """What a person, or a program, says."""

    text: str


class OutputText(Struct, tag_field="type", tag="output_text", forbid_unknown_fields=True):
    """What a model said; the fields an answer brings may come back as they were."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class PlainText(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A text that does not say whose it is."""

    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal", forbid_unknown_fields=True):
    """A refusal, as a model worded it."""

    refusal: str


Part = InputText | OutputText | PlainText | RefusalPart
ItemContent = str | Annotated[list[Part], Meta(max_length=MAX_PARTS)]


class Item(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message (`role`, `content`), a call (`call_id`, `name`, `arguments`) or its result (`call_id`, `output`).

    `id`, `status` and `phase` are accepted as answers brought them; an item that is stored gets an id of its own.
    """

    type: Literal["message", "function_call", "function_call_output"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: ItemContent | None = None
    call_id: Label | None = None
    name: Name | None = None
    arguments: str | None = None
    output: ItemContent | None = None
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ResponseFunction(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class SchemaFormat(Struct, tag_field="type", tag="json_schema", kw_only=True, forbid_unknown_fields=True):
    """JSON that a schema describes; `strict` changes nothing: a schema is always enforced."""

    name: Name
    schema: Schema
    description: str | None = None
    strict: bool | None = None


class TextConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """How the text is to look."""

    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Struct, kw_only=True, forbid_unknown_fields=True):
    """`effort` is for models whose template knows it."""

    effort: Label | None = None
    summary: Annotated[None, Meta(description="there are no summaries")] = None
    generate_summary: Annotated[None, Meta(description="there are no summaries")] = None


class NamedChoice(Struct, forbid_unknown_fields=True):
    """The model must call this function."""

    type: Literal["function"]
    name: Name


class ConversationName(Struct, forbid_unknown_fields=True):
    """A conversation by its id."""

    id: Label


class ResponseStreamOptions(Struct, forbid_unknown_fields=True):
    """Accepted: nothing is padded either way."""

    include_obfuscation: bool | None = None


class ResponseRequest(Hinted, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/responses."""

    input: str | list[Item]
    model: Label | None = None
    instructions: str | None = None
    previous_response_id: Label | None = None
    conversation: Label | ConversationName | None = None
    store: bool | None = None
    metadata: UserMetadata | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    text: TextConfig | None = None
    tools: list[ResponseFunction] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    background: Annotated[bool, Meta(description="only false")] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: CountOrZero | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    knowledge: Documents | None = None
    prompt: Annotated[None, Meta(description="there are no stored prompts")] = None
    context_management: Annotated[None, Meta(description="nothing is compacted: shorten the input")] = None
    max_tool_calls: Annotated[None, Meta(description="there are no built-in tools")] = None
    top_logprobs: Annotated[None, Meta(description="use /v1/chat/completions")] = None
    prompt_cache_options: Annotated[None, Meta(description="every prompt is cached as far as there is room")] = None
    moderation: Annotated[None, Meta(description="nothing is moderated")] = None


class ConversationRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/conversations; `name` is this server's own, unique for its tenant."""

    items: Annotated[list[Item], Meta(max_length=MAX_ITEMS)] | None = None
    metadata: UserMetadata | None = None
    name: SessionLabel | None = None


class ConversationUpdate(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/conversations/{id}: the metadata from now on."""

    metadata: UserMetadata


class ItemsRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/conversations/{id}/items."""

    items: Annotated[list[Item], Meta(min_length=1, max_length=MAX_ITEMS)]
