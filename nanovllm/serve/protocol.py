"""The bodies that clients send: one Struct per endpoint, with the bounds of every field.

What it is: types, from which both the strict decoding and the OpenAPI document follow.
What it knows nothing about: the engine, HTTP. Invariants: a field that is not here is
refused by name; null means absent for every optional field; a field annotated as
`Annotated[None, why]` is known from other servers and refused unless it is null. How many messages, prompts
and tools there may be is a server's setting: see `Limits`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct

from nanovllm.core.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP, MAX_STOP_IDS

MAX_CHOICES = 1024
MAX_SESSION = 128

Count = Annotated[int, Meta(ge=1, le=2**31)]
CountOrZero = Annotated[int, Meta(ge=0, le=2**31)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Text = Annotated[str, Meta(min_length=1)]
Label = Annotated[str, Meta(max_length=256)]
SessionName = Annotated[str, Meta(min_length=1, max_length=MAX_SESSION)]
Documents = Annotated[list[Annotated[str, Meta(min_length=1, max_length=257)]], Meta(max_length=1024)]
Schema = dict[str, Any]


class Hints(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that say something about the caller and change no output: accepted, without effect."""

    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class Hinted(Hints, kw_only=True, forbid_unknown_fields=True):
    """Fields that change no output either, but say which state will be wanted again: see `session_hint`."""

    session_id: SessionName | None = None
    prompt_cache_key: SessionName | None = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`continuous_usage_stats` is vLLM's: with `include_usage`, each chunk tells its choice's usage so far.

    `include_obfuscation` is accepted: nothing is padded either way.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's constraints on the whole output: exactly one of them."""

    json: Schema | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[Text], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None


class Sampling(Hinted, kw_only=True, forbid_unknown_fields=True):
    """What chat and text completions have in common."""

    model: Label | None = None
    max_tokens: Count | None = None
    min_tokens: CountOrZero | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    stop: Text | Annotated[list[Text], Meta(max_length=MAX_STOP)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] | None = None
    cache_salt: Label | None = None
    prompt_logprobs: Annotated[None, Meta(description="prompt tokens have no log-probabilities here")] = None
    use_beam_search: Annotated[None, Meta(description="there is no beam search")] = None
    bad_words: Annotated[None, Meta(description="use logit_bias")] = None
    allowed_token_ids: Annotated[None, Meta(description="use structured_outputs")] = None
    prompt_embeds: Annotated[None, Meta(description="prompts are text or token ids")] = None
    truncate_prompt_tokens: Annotated[None, Meta(description="a prompt is never cut: shorten it")] = None
    guided_json: Annotated[None, Meta(description="use structured_outputs")] = None
    guided_regex: Annotated[None, Meta(description="use structured_outputs")] = None
    guided_choice: Annotated[None, Meta(description="use structured_outputs")] = None
    guided_grammar: Annotated[None, Meta(description="use structured_outputs")] = None


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """The only kind of content part: there are no images, sounds or files."""

    text: str


Content = str | list[TextPart]


class FunctionCall(Struct, forbid_unknown_fields=True):
    """`arguments` is JSON text, as the model wrote it."""

    name: Name
    arguments: str


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """One call that an assistant made."""

    id: Label
    type: Literal["function"] = "function"
    function: FunctionCall
    index: CountOrZero | None = None  # left over from a stream's delta


class SystemMessage(Struct, tag_field="role", tag="system", forbid_unknown_fields=True):
    """Instructions."""

    content: Content
    name: Label | None = None


class DeveloperMessage(Struct, tag_field="role", tag="developer", forbid_unknown_fields=True):
    """Instructions, as newer clients name them."""

    content: Content
    name: Label | None = None


class UserMessage(Struct, tag_field="role", tag="user", forbid_unknown_fields=True):
    """What a person says."""

    content: Content
    name: Label | None = None


class AssistantMessage(Struct, tag_field="role", tag="assistant", kw_only=True, forbid_unknown_fields=True):
    """What the model said earlier; the fields an answer brings may come back as they were."""

    content: Content | None = None
    name: Label | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: Annotated[None, Meta(description="there is no sound")] = None
    function_call: Annotated[None, Meta(description="use tool_calls")] = None


class ToolMessage(Struct, tag_field="role", tag="tool", forbid_unknown_fields=True):
    """What a tool answered."""

    content: Content
    tool_call_id: Label
    name: Label | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionTool(Struct, forbid_unknown_fields=True):
    """A function the model may call; `parameters` is a JSON schema of an object."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    """The only kind of tool is a function of the client's."""

    type: Literal["function"]
    function: FunctionTool


class FunctionName(Struct, forbid_unknown_fields=True):
    """Names a function."""

    name: Name


class NamedToolChoice(Struct, forbid_unknown_fields=True):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionName


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """No constraint."""


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    """`strict` changes nothing: a schema is always enforced. Without `schema`: any JSON object."""

    name: Name
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that a schema describes."""

    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class ChatRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Label | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    modalities: list[Literal["text"]] | None = None
    knowledge: Documents | None = None
    store: bool | None = None
    continue_final_message: Annotated[bool, Meta(description="only false")] | None = None
    chat_template: Annotated[None, Meta(description="templates come from the model")] = None
    documents: Annotated[None, Meta(description="use chat_template_kwargs.documents")] = None
    audio: Annotated[None, Meta(description="there is no sound")] = None
    functions: Annotated[None, Meta(description="use tools")] = None
    function_call: Annotated[None, Meta(description="use tool_choice")] = None
    prediction: Annotated[None, Meta(description="predicted outputs are not used")] = None
    verbosity: Annotated[None, Meta(description="say it in the messages")] = None
    web_search_options: Annotated[None, Meta(description="there is no web search")] = None


class CompletionRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    response_format: ResponseFormat | None = None
    suffix: Annotated[None, Meta(description="there is no filling in between prompt and suffix")] = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /tokenize: `prompt` or `messages`."""

    model: Label | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: Annotated[bool, Meta(description="only false")] | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /detokenize."""

    model: Label | None = None
    tokens: list[TokenId]


REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
HINTS = Hints.__struct_fields__


def refused_fields(kind: type[Struct]) -> dict[str, str]:
    """Fields of `kind` that only null is accepted for, and what to do instead."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: hint.__metadata__[0].description or ""
        for name, hint in hints.items()
        if get_origin(hint) is Annotated and get_args(hint)[0] is type(None)
    }
