"""The official client, unmodified, against the live server: the judge of compatibility."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from nanovllm import LLM, SamplingParams
from tests.serve.surface import HI, Live

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, today",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris, in celsius? Use the tool."}]


class Place(BaseModel):
    country: Literal["France", "Italy", "Spain"]
    is_capital: bool


def client_of(live: Live, **settings: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", timeout=60, max_retries=0, **settings)


@pytest.fixture(scope="module")
def tiny_client(tiny: Live) -> Iterator[openai.OpenAI]:
    with client_of(tiny) as client:
        yield client


@pytest.fixture(scope="module")
def client(smollm2: Live) -> Iterator[openai.OpenAI]:
    with client_of(smollm2) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2", "smol"]
    assert client.models.retrieve("smol").owned_by == "nanovllm"


def test_a_chat_its_stream_and_the_offline_engine_agree(client: openai.OpenAI, smollm2: Live) -> None:
    asked = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 16}
    whole = client.chat.completions.create(**asked)
    answer = whole.choices[0].message.content
    assert "Paris" in answer and whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == answer
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the second time
    with LLM(smollm2.services.engine.config.model, dtype="float32", num_blocks=64, progress=False) as llm:
        assert llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=16))[0].text == answer


def test_a_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="smollm2", messages=QUESTION, temperature=0, max_tokens=8) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds and "Paris" in final.choices[0].message.content


def test_parse_fills_a_model(client: openai.OpenAI) -> None:
    done = client.chat.completions.parse(
        model="smollm2", messages=QUESTION, response_format=Place, temperature=0, max_tokens=100
    )
    assert isinstance(done.choices[0].message.parsed, Place)


def test_json_mode(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": 'Write {"a": 1} as JSON.'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=100,
    )
    assert done.choices[0].finish_reason == "length" or isinstance(json.loads(done.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("choice", "stream"), [("required", False), ({"type": "function", "function": {"name": "get_weather"}}, True)]
)
def test_forced_tools_and_the_way_back(client: openai.OpenAI, choice: object, stream: bool) -> None:
    asked = {"model": "smollm2", "messages": ASK_WEATHER, "tools": [WEATHER], "temperature": 0, "max_tokens": 120}
    asked |= {"tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            done = events.get_final_completion()
    else:
        done = client.chat.completions.create(**asked)
    message = done.choices[0].message
    assert done.choices[0].finish_reason == "tool_calls" and not message.content
    arguments = json.loads(message.tool_calls[0].function.arguments)
    assert arguments["unit"] in ("celsius", "fahrenheit") and isinstance(arguments["city"], str)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "22 degrees and sunny"}
    sent_back = message.model_dump(exclude={"parsed"})
    for call in sent_back["tool_calls"]:
        call["function"].pop("parsed_arguments", None)
    after = client.chat.completions.create(
        model="smollm2", messages=[*ASK_WEATHER, sent_back, result], tools=[WEATHER], temperature=0, max_tokens=12
    )
    assert after.choices[0].message.content or after.choices[0].message.tool_calls


def test_tools_the_model_may_use(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="smollm2", messages=ASK_WEATHER, tools=[WEATHER], temperature=0, max_tokens=12
    )
    message = done.choices[0].message
    assert (done.choices[0].finish_reason == "tool_calls") == bool(message.tool_calls)
    assert message.content or message.tool_calls


def test_text_completions(client: openai.OpenAI) -> None:
    done = client.completions.create(model="smollm2", prompt="The capital of France is", temperature=0, max_tokens=4)
    assert "Paris" in done.choices[0].text
    echoed = client.completions.create(model="smol", prompt=["a b", "c d"], echo=True, max_tokens=2, n=2)
    assert [choice.text[:3] for choice in echoed.choices] == ["a b", "a b", "c d", "c d"]
    scored = client.completions.create(model="smollm2", prompt="a b", logprobs=3, max_tokens=2, temperature=0)
    assert len(scored.choices[0].logprobs.tokens) == 2 and len(scored.choices[0].logprobs.top_logprobs[0]) == 3
    streamed = client.completions.create(model="smollm2", prompt="The capital", max_tokens=4, stream=True)
    assert list(streamed)[-1].choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="smollm2", messages=HI, logprobs=True, top_logprobs=2, max_tokens=3, temperature=0
    )
    content = done.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == done.choices[0].message.content
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, openai.BadRequestError, "messages"),
        ({"extra_body": {"best": 1}}, openai.BadRequestError, "best"),
        ({"reasoning_effort": "high"}, openai.BadRequestError, "reasoning_effort"),
        ({"store": True}, openai.BadRequestError, "store"),
        ({"audio": {"voice": "x", "format": "mp3"}}, openai.BadRequestError, "audio"),
    ],
)
def test_refusals_are_the_clients_exceptions(
    tiny_client: openai.OpenAI, fields: dict, kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as caught:
        tiny_client.chat.completions.create(**{"model": "tiny:random", "messages": HI, **fields})
    assert caught.value.param == param and caught.value.code and caught.value.request_id


def test_many_at_once_on_the_async_client(tiny: Live) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="unused", max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model="tiny:random", messages=HI, temperature=0, max_tokens=8, stream=odd
                )
                for odd in [False, True] * 8
            ]
            answers = await asyncio.gather(*asked)
            return [
                "".join([chunk.choices[0].delta.content or "" async for chunk in answer]) if odd else
                answer.choices[0].message.content
                for odd, answer in zip([False, True] * 8, answers)
            ]  # fmt: skip

    assert len(set(asyncio.run(ask()))) == 1
