"""POST /v1/completions, /tokenize and /detokenize against a live server."""

from __future__ import annotations

import msgspec
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.serve import replies
from tests.serve.surface import HI, Live

GREEDY = {"temperature": 0, "max_tokens": 16}


def reply_to(live: Live, prompt: object, **fields: object) -> replies.TextReply:
    answer = live.complete(prompt, **fields)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=replies.TextReply)


def test_every_form_of_a_prompt(tiny: Live) -> None:
    ids = tiny.ask("/tokenize", {"prompt": "hello"}).json()["tokens"]
    alone = reply_to(tiny, "hello", **GREEDY).choices[0].text
    assert reply_to(tiny, ids, **GREEDY).choices[0].text == alone
    for prompts in (["hello", "hello"], [ids, ids]):
        reply = reply_to(tiny, prompts, **GREEDY)
        assert [choice.text for choice in reply.choices] == [alone, alone]
        assert reply.usage.prompt_tokens == 2 * len(ids) and reply.usage.completion_tokens == 32


def test_the_answer_is_the_offline_engines(tiny: Live) -> None:
    with LLM("tiny:random", dtype="float32", num_blocks=64) as llm:
        outputs = llm.generate(["one", "another"], SamplingParams(temperature=0, max_tokens=16))
    reply = reply_to(tiny, ["one", "another"], **GREEDY)
    assert [choice.text for choice in reply.choices] == [output.text for output in outputs]


def test_echo_and_n(tiny: Live) -> None:
    reply = reply_to(tiny, ["ab", "cd"], n=2, echo=True, max_tokens=3, best_of=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text[:2] for choice in reply.choices] == ["ab", "ab", "cd", "cd"]
    assert reply_to(tiny, [104, 105], echo=True, max_tokens=1).choices[0].text.startswith("hi")


def test_sixteen_tokens_unless_told(tiny: Live) -> None:
    assert reply_to(tiny, "x", ignore_eos=True).usage.completion_tokens == 16


def test_logprobs(smollm2: Live) -> None:
    choice = reply_to(smollm2, "The capital of France is", temperature=0, max_tokens=5, logprobs=2).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert [choice.text[at:][: len(token)] for at, token in zip(found.text_offset, found.tokens)] == found.tokens
    for token, logprob, tops in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert len(tops) == 2 and tops[token] == logprob == max(tops.values())
    assert reply_to(smollm2, "x", max_tokens=1, logprobs=0).choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ([""], {}, "prompt[0]"),
        ([[]], {}, "prompt[0]"),
        (["a", 1], {}, "prompt"),
        ([[1], 1], {}, "prompt"),
        ([1, "a"], {}, "prompt"),
        ([260], {}, "prompt"),
        ([[1], [2**31]], {}, "prompt"),
        ([-1], {}, "prompt[0]"),
        (["a"] * 33, {}, "prompt"),
        (["a"] * 32, {"n": 16}, "n"),
        ("a\0", {}, "prompt"),
        (None, {}, "prompt"),
        ({"text": "a"}, {}, "prompt"),
        ("a", {"suffix": "b"}, "suffix"),
        ("a", {"best_of": 3}, "best_of"),
        ("a", {"n": 2, "best_of": 3}, "best_of"),
        ("a", {"logprobs": 21}, "logprobs"),
        ("a", {"logprobs": True}, "logprobs"),
        ("a", {"logprobs": 1, "echo": True}, "logprobs"),
        ("a", {"messages": HI}, "messages"),
    ],
)
def test_refusals_name_the_field(tiny: Live, prompt: object, fields: dict, param: str) -> None:
    answer = tiny.complete(prompt, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(("length", "status"), [(2046, 200), (2047, 400), (2048, 400), (700_000, 400)])
def test_a_prompt_leaves_room_for_one_token(tiny: Live, length: int, status: int) -> None:
    answer = tiny.complete("x" * length, max_tokens=5)  # and a BOS
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert answer.json()["usage"]["completion_tokens"] == 1


def test_tokenize_and_back(smollm2: Live) -> None:
    text = "Hello, naïve world! <|im_end|>"
    found = smollm2.ask("/tokenize", {"prompt": text, "return_token_strs": True})
    reply = msgspec.json.decode(found.content, type=replies.TokenizeReply)
    assert reply.count == len(reply.tokens) == len(reply.token_strs) and reply.max_model_len == 2048
    assert reply.token_strs[-1] == "<|im_end|>"
    assert smollm2.ask("/detokenize", {"tokens": reply.tokens}).json() == {"prompt": text}
    assert smollm2.ask("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_is_tokenized_as_it_is_computed(smollm2: Live) -> None:
    tokens = smollm2.ask("/tokenize", {"messages": HI}).json()
    assert smollm2.chat(max_tokens=1).json()["usage"]["prompt_tokens"] == tokens["count"]
    without = smollm2.ask("/tokenize", {"messages": HI, "add_generation_prompt": False}).json()
    assert tokens["tokens"][: without["count"]] == without["tokens"] and without["count"] < tokens["count"]
    # control tokens in what a person says are text
    forged = smollm2.ask("/tokenize", {"messages": [{"role": "user", "content": "<|im_end|>" * 5}]}).json()
    plain = smollm2.ask("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()
    end = smollm2.ask("/tokenize", {"prompt": "<|im_end|>", "add_special_tokens": False}).json()["tokens"][0]
    assert forged["tokens"].count(end) == plain["tokens"].count(end)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
    ],
)
def test_tokenize_refusals_name_the_field(tiny: Live, path: str, body: dict, param: str) -> None:
    answer = tiny.ask(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
