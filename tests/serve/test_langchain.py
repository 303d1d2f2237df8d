"""LangChain's ChatOpenAI, unmodified: invoke, stream, batch, tools, structured output."""

from __future__ import annotations

from typing import Literal

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.serve.surface import Live


class Weather(BaseModel):
    """The weather of a city, today."""

    city: Literal["Paris", "Rome"]
    unit: Literal["celsius", "fahrenheit"] = Field(description="of the temperature")


@pytest.fixture(scope="module")
def llm(smollm2: Live) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{smollm2.url}/v1", api_key="unused", model="smollm2", temperature=0, max_tokens=60, max_retries=0
    )


def test_invoke_and_stream_agree(llm: ChatOpenAI) -> None:
    messages = [SystemMessage("Answer in one word."), HumanMessage("What is the capital of France?")]
    answer = llm.invoke(messages)
    assert "Paris" in answer.content and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(llm.stream(messages))
    assert "".join(chunk.content for chunk in chunks) == answer.content and len(chunks) > 1


def test_batch(llm: ChatOpenAI) -> None:
    answers = llm.bind(max_tokens=4).batch(["One", "Two", "Three"])
    assert len(answers) == 3 and all(isinstance(answer.content, str) for answer in answers)


def test_tools_forced_and_answered(llm: ChatOpenAI) -> None:
    forced = llm.bind_tools([Weather], tool_choice="Weather")
    question = HumanMessage("What is the weather in Paris, in celsius?")
    answer = forced.invoke([question])
    assert isinstance(answer, AIMessage) and [call["name"] for call in answer.tool_calls] == ["Weather"]
    Weather(**answer.tool_calls[0]["args"])
    result = ToolMessage("22 degrees", tool_call_id=answer.tool_calls[0]["id"])
    after = llm.bind_tools([Weather]).bind(max_tokens=8).invoke([question, answer, result])
    assert after.content or after.tool_calls
    streamed = list(forced.stream([question]))
    joined = streamed[0]
    for chunk in streamed[1:]:
        joined += chunk
    assert [call["name"] for call in joined.tool_calls] == ["Weather"] and joined.content == ""


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(llm: ChatOpenAI, method: str) -> None:
    found = llm.with_structured_output(Weather, method=method).invoke("The weather in Rome, in fahrenheit, please.")
    assert isinstance(found, Weather)


@pytest.fixture(scope="module")
def stateful(smollm2: Live) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{smollm2.url}/v1",
        api_key="unused",
        model="smollm2",
        temperature=0,
        max_tokens=60,
        max_retries=0,
        use_responses_api=True,
        use_previous_response_id=True,
    )


@pytest.fixture(scope="module")
def brief(stateful: ChatOpenAI) -> ChatOpenAI:
    """The same where what is said does not matter."""
    return stateful.model_copy(update={"max_tokens": 12})


def test_a_conversation_that_the_server_keeps(brief: ChatOpenAI, smollm2: Live) -> None:
    """Only the last message is sent; what came before is found in the tokens that it was computed in."""
    talk: list[BaseMessage] = []
    total = 0
    for said in ("My name is Ada and I like herons.", "Where do they nest?", "What is my name?"):
        talk.append(HumanMessage(said))
        answer = brief.invoke(talk)
        assert answer.response_metadata["id"].startswith("resp_") and answer.text
        usage = answer.usage_metadata
        assert usage["input_token_details"]["cache_read"] >= max(0, total - 1) // 16 * 16
        assert usage["input_tokens"] > total
        total = usage["total_tokens"]
        talk.append(answer)
    kept = smollm2.http.get(f"/v1/responses/{answer.response_metadata['id']}/input_items").json()
    assert [item["role"] for item in kept["data"]] == ["user", "assistant"] * 2 + ["user"]


def test_the_kept_conversation_streams_and_calls(stateful: ChatOpenAI, brief: ChatOpenAI) -> None:
    talk: list[BaseMessage] = [HumanMessage("Say hello.")]
    joined = None
    for chunk in brief.stream(talk):
        joined = chunk if joined is None else joined + chunk
    assert joined is not None and joined.text == brief.invoke(talk).text
    forced = stateful.bind_tools([Weather], tool_choice="Weather", parallel_tool_calls=False)
    question = HumanMessage("What is the weather in Rome, in celsius?")
    called = forced.invoke([question])
    assert [call["name"] for call in called.tool_calls] == ["Weather"]
    result = ToolMessage("22 degrees", tool_call_id=called.tool_calls[0]["id"])
    after = brief.bind_tools([Weather]).invoke([question, called, result])
    assert after.text or after.tool_calls


def test_structured_output_of_responses(stateful: ChatOpenAI) -> None:
    wanted = stateful.with_structured_output(Weather, method="json_schema")
    assert isinstance(wanted.invoke("The weather in Rome, in fahrenheit, please."), Weather)
