"""Tools: offered, enforced, written by four kinds of template, and read back however the text is cut."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest

from nanovllm.core.grammar import Grammar
from nanovllm.errors import InvalidRequestError
from nanovllm.models.chat_template import ChatTemplate
from nanovllm.serve import replies
from nanovllm.serve.config import Limits
from nanovllm.serve.conversation import conversation
from nanovllm.serve.decode import decode
from nanovllm.serve.protocol import ChatRequest, FunctionTool
from nanovllm.serve.tool_calls import Call, parser_for
from nanovllm.serve.tool_grammar import MAX_CALLS, tool_grammar
from nanovllm.serve.tools import ToolStyle, ToolUse, style_of, tool_use
from tests.serve.surface import HI, Live

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
QWEN = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call></tool_call><|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)  # fmt: skip
LLAMA = "{% if tools is not none %}{{ tools[0].function.parameters | tojson }}<|python_tag|>{% endif %}"
MISTRAL = "{% if tools is not none %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}"


def request(**fields: Any) -> ChatRequest:
    return decode(json.dumps({"messages": HI, "tools": TOOLS, **fields}).encode(), ChatRequest, 64)


def use_of(template: str = "", **fields: Any) -> ToolUse:
    return tool_use(request(**fields), template, Limits())


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (None, ToolStyle("hermes", is_native=False)),
        ("{{ messages }}", ToolStyle("hermes", is_native=False)),
        (QWEN, ToolStyle("hermes", is_native=True)),
        (LLAMA, ToolStyle("llama", is_native=True)),
        (MISTRAL, ToolStyle("mistral", is_native=True)),
        ("{{ tools }}<tool_call><function=x>", ToolStyle("hermes", is_native=False)),
        ("{{ tools }}", ToolStyle("hermes", is_native=False)),
    ],
)
def test_a_template_tells_its_style(template: str | None, style: ToolStyle) -> None:
    assert style_of(template) == style


@pytest.mark.parametrize(
    ("fields", "choice", "names", "is_parallel"),
    [
        ({}, "auto", ["weather", "clock"], True),
        ({"tool_choice": "none"}, "none", ["weather", "clock"], True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "required", ["weather", "clock"], False),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, "named", ["clock"], False),
        ({"tools": None}, "none", [], True),
        ({"tools": [], "tool_choice": "none"}, "none", [], True),
    ],
)
def test_what_a_request_allows(fields: dict, choice: str, names: list[str], is_parallel: bool) -> None:
    use = use_of(**fields)
    assert (use.choice, [function.name for function in use.functions], use.is_parallel) == (choice, names, is_parallel)
    assert use.is_offered == (choice != "none")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice.function.name"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
    ],
)
def test_bad_tools_are_refused(fields: dict, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        use_of(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("schema", [{"a": "x" * 70_000}, {"a": json.loads('{"b":' * 33 + "1" + "}" * 33)}])
def test_large_schemas_are_refused(schema: dict) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(InvalidRequestError) as caught:
        use_of(tools=[tool])
    assert caught.value.param == "tools[0].function.parameters"


# -- reading back ----------------------------------------------------------------------------------------

ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ROME, NOW = Call("weather", '{"city": "Rome"}'), Call("clock", "{}")
LLAMA_ONE = '{"name": "weather", "parameters": {"city": "Rome"}}'
TAGGED = [
    ("", []),
    ("hello", ["hello"]),
    ("  hello \n", ["  hello \n"]),
    (ONE, [ROME]),
    ("I look.\n\n" + ONE, ["I look.", ROME]),
    (ONE + "\n" + '<tool_call>{"name":"clock","arguments":{}}</tool_call>\n', [ROME, NOW]),
    (ONE + "\n done ", [ROME, "done "]),
    ("a <tool_ call> < <tool_cal", ["a <tool_ call> < <tool_cal"]),
    ('<tool_call>{"name":"clock"}', [NOW]),  # never closed, but whole
    ('<tool_call>{"name":"clock","arguments":"{}"}</tool_call>', [NOW]),  # arguments as text
    ('<tool_call>{"name":"clo', ['<tool_call>{"name":"clo']),
    ("<tool_call>nonsense</tool_call>", ["<tool_call>nonsense</tool_call>"]),
    ('<tool_call>{"name":"rm","arguments":{}}</tool_call>', ['<tool_call>{"name":"rm","arguments":{}}</tool_call>']),
    ('<tool_call>{"name":["a"]}</tool_call>', ['<tool_call>{"name":["a"]}</tool_call>']),
    ('<tool_call>{"name":"clock","arguments":[1]}</tool_call>',) * 2,
    ('<tool_call>{"name":"clock","arguments":{"a":1e999}}</tool_call>',) * 2,
    ('<tool_call>{"name":"clock","arguments":{"a":NaN}}</tool_call>',) * 2,
    ("<tool_call>" + "[" * 5000 + "</tool_call>",) * 2,
]
LLAMAS = [
    ("hello {", ["hello {"]),
    (LLAMA_ONE, [ROME]),
    ("<|python_tag|>" + LLAMA_ONE, [ROME]),
    (LLAMA_ONE + "; " + '{"name": "clock", "parameters": {}}', [ROME, NOW]),
    ('{"name": "rm", "parameters": {}}', ['{"name": "rm", "parameters": {}}']),
    ("{not json", ["{not json"]),
    ("  {", ["  {"]),
    ("<|pyth", ["<|pyth"]),
]
MISTRALS = [
    ("hello [", ["hello ["]),
    ('[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "clock", "arguments": {}}]', [ROME, NOW]),
    ('[TOOL_CALLS] [{"name": "clock", "arguments": {}}]', [NOW]),
    ("[1, 2]", ["[1, 2]"]),
    ("[]", ["[]"]),
    (' [{"name": "clock", "arguments": {}}]', [NOW]),
]
FAMILIES = {"hermes": TAGGED, "llama": LLAMAS, "mistral": MISTRALS}
CASES = [(family, *case) for family, cases in FAMILIES.items() for case in cases]


def read(family: Any, parts: list[str]) -> list[Any]:
    """The pieces, neighbouring texts joined."""
    parser = parser_for(ToolUse(ToolStyle(family, is_native=True), use_of().functions, "auto"))
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
    assert parser.finish() == []
    joined: list[Any] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@pytest.mark.parametrize(("family", "text", "expected"), CASES)
def test_calls_are_read_however_the_text_is_cut(family: str, text: str, expected: Any) -> None:
    expected = [expected] if isinstance(expected, str) else expected
    dice = random.Random(len(text))
    assert read(family, [text]) == expected
    assert read(family, list(text)) == expected
    for _ in range(20):
        cuts = sorted(dice.choices(range(len(text) + 1), k=3))
        assert read(family, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]) == expected


@pytest.mark.parametrize("text", ["<", "<tool_call>", "<tool_call></tool_call>", " ", "{", "[", '<tool_call>{"name":'])
@pytest.mark.parametrize("family", ["hermes", "llama", "mistral"])
def test_reading_is_linear(family: Any, text: str) -> None:
    """No feed looks at more than its own text and a few letters before it; the rest waits in lists."""
    parser = parser_for(ToolUse(ToolStyle(family, is_native=True), use_of().functions, "auto"))
    for _ in range(2000):
        parser.feed(text)
        assert all(len(held) < 64 for held in vars(parser).values() if isinstance(held, str))
    parser.finish()


# -- enforcing -------------------------------------------------------------------------------------------


def accepts(grammar: str, text: str) -> bool:
    """Whether the byte-level grammar takes `text` to its end."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    class Bytes:
        eos_token_id, bos_token_id = 257, 256
        tokens = [*(bytes([i]) for i in range(256)), b"<bos>", b"<eos>"]
        special_token_ids = [256, 257]

        def __call__(self, text: Any) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), grammar)
    assert not matcher.get_error(), matcher.get_error()
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(family: str, *calls: tuple[str, str]) -> str:
    key = "parameters" if family == "llama" else "arguments"
    texts = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
    if family == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    return "; ".join(texts) if family == "llama" else f"[{', '.join(texts)}]"


TEMPLATES = {"hermes": QWEN, "llama": LLAMA, "mistral": MISTRAL}
PARIS, TIME = ("weather", '{"city": "Paris"}'), ("clock", "{}")


@pytest.mark.parametrize("family", TEMPLATES)
def test_forced_calls_are_all_there_is(family: str) -> None:
    grammar = tool_grammar(use_of(TEMPLATES[family], tool_choice="required"), None)
    assert Grammar.lark(grammar)
    for calls in ([PARIS], [TIME], [TIME, PARIS], [TIME] * MAX_CALLS):
        text = written(family, *calls)
        assert accepts(grammar, text)
        assert read(family, [text]) == [Call(*call) for call in calls]
    for text in (
        "",
        "hello",
        written(family, ("weather", '{"city": "Oslo"}')),
        written(family, ("clock", '{"a": 1}')),
        written(family, ("rm", "{}")),
        written(family, *[TIME] * (MAX_CALLS + 1)),
        written(family, TIME) + " and",
    ):
        assert not accepts(grammar, text)


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_named_function_is_called_once(family: str) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    grammar = tool_grammar(use_of(TEMPLATES[family], tool_choice=named), None)
    assert accepts(grammar, written(family, PARIS))
    assert not accepts(grammar, written(family, TIME)) and not accepts(grammar, written(family, PARIS, PARIS))


@pytest.mark.parametrize("family", TEMPLATES)
def test_strict_functions_are_bound_where_the_model_calls_them(family: str) -> None:
    tools = [{"type": "function", "function": {**WEATHER["function"], "strict": True}}, CLOCK]
    grammar = tool_grammar(use_of(TEMPLATES[family], tools=tools), None)
    bound = written(family, ("weather", '{"city": "Oslo"}'))
    assert accepts(grammar, written(family, PARIS)) and not accepts(grammar, bound)
    assert accepts(grammar, written(family, ("clock", '{"a": 1}')))  # not strict: any object
    assert accepts(grammar, "No call, a < b.") and accepts(grammar, "")
    assert tool_grammar(use_of(TEMPLATES[family]), None) is None  # nothing strict: nothing to enforce


def test_a_schema_and_tools_at_once() -> None:
    answer = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    grammar = tool_grammar(use_of(), answer)
    assert accepts(grammar, written("hermes", PARIS)) and accepts(grammar, '{"ok": true}')
    assert not accepts(grammar, "hello")
    assert tool_grammar(use_of(tool_choice="none"), answer) is None


def test_references_find_their_root() -> None:
    schema = {"$defs": {"c": {"enum": ["x"]}}, "properties": {"a": {"$ref": "#/$defs/c"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    grammar = tool_grammar(use_of(tools=[tool, CLOCK], tool_choice="required"), None)
    assert accepts(grammar, written("hermes", ("f", '{"a": "x"}')))
    assert not accepts(grammar, written("hermes", ("f", '{"a": "y"}')))


@pytest.mark.parametrize(
    ("parameters", "is_open"),
    [
        ({"properties": {"a": {"enum": [1]}}}, False),
        ({"properties": {"a": {"enum": [1]}}, "additionalProperties": True}, True),
        ({"anyOf": [{"properties": {"a": {"enum": [1]}}}]}, True),
    ],
)
def test_arguments_are_the_listed_ones(parameters: dict, is_open: bool) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    grammar = tool_grammar(use_of(tools=[tool], tool_choice="required"), None)
    assert accepts(grammar, written("hermes", ("f", '{"a": 1}')))
    assert accepts(grammar, written("hermes", ("f", '{"a": 1, "b": 2}'))) == is_open


# -- writing ---------------------------------------------------------------------------------------------

TRIP = [
    {"role": "user", "content": "Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_0123456789ab", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_0123456789ab", "content": "22 C"},
    {"role": "tool", "tool_call_id": "call_0123456789ab", "content": "sunny"},
]


def rendered(template: str) -> list[dict]:
    body = request(messages=TRIP)
    functions: tuple[FunctionTool, ...] = use_of(template).functions
    return conversation(body.messages, functions, style_of(template), template, {}).messages


def test_a_native_template_gets_objects() -> None:
    turns = rendered(QWEN)
    assert turns[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert turns[1]["content"] == "" and turns[2]["role"] == "tool"
    text = ChatTemplate(QWEN).render(turns, {"tools": [WEATHER]})
    assert ONE in text and '"The weather of a city"' in text


def test_mistral_gets_ids_of_its_length() -> None:
    turns = rendered(MISTRAL)
    assert turns[1]["tool_calls"][0]["id"] == "3456789ab" == turns[2]["tool_call_id"]


def test_other_templates_get_text() -> None:
    turns = rendered("")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert '"name": "weather"' in turns[0]["content"] and turns[2]["content"] == ONE
    assert turns[3]["content"].count("<tool_response>") == 2 and "22 C" in turns[3]["content"]


@pytest.mark.parametrize("arguments", ["", "{", "[]", "1", "[" * 5000])
def test_arguments_that_come_back_are_objects(tiny: Live, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = tiny.chat([*HI, {"role": "assistant", "tool_calls": [call]}], max_tokens=1)
    assert answer.status_code == (400 if arguments else 200)
    if arguments:
        assert answer.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


# -- over HTTP -------------------------------------------------------------------------------------------


def deltas(live: Live, **fields: Any) -> list[replies.ChunkChoice]:
    events = live.events("/v1/chat/completions", {"messages": HI, **fields})
    return [msgspec.convert(event, replies.ChatChunk).choices[0] for event in events[:-1]]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_over_http(tiny: Live, choice: Any) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 300, "seed": 2}
    found = msgspec.json.decode(tiny.chat(**fields, n=2).content, type=replies.ChatReply)
    for one in found.choices:
        assert one.finish_reason == "tool_calls" and one.message.content is None
        assert [call.function.name for call in one.message.tool_calls] == ["weather"]
        assert json.loads(one.message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
    streamed = deltas(tiny, **fields)
    assert not any(choice.delta.content for choice in streamed)  # no markup leaks
    calls = [call for choice in streamed for call in choice.delta.tool_calls or []]
    assert [call.index for call in calls] == [0] and streamed[-1].finish_reason == "tool_calls"
    assert calls[0].function == found.choices[0].message.tool_calls[0].function
    assert calls[0].id.startswith("call_")


def test_a_call_cut_short_says_length(tiny: Live) -> None:
    choice = tiny.chat(tools=[WEATHER], tool_choice="required", max_tokens=5).json()["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]


def test_tools_that_may_not_be_called_are_not_mentioned(tiny: Live) -> None:
    with_none = tiny.chat(tools=TOOLS, tool_choice="none", max_tokens=1).json()["usage"]["prompt_tokens"]
    assert with_none == tiny.chat(max_tokens=1).json()["usage"]["prompt_tokens"]
    assert tiny.chat(tools=TOOLS, max_tokens=1).json()["usage"]["prompt_tokens"] > with_none


def test_a_bad_schema_of_a_tool_is_refused(tiny: Live) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "("}}}}}
    answer = tiny.chat(tools=[tool], tool_choice="required", max_tokens=5)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools"), answer.text
