"""The streaming contract: order, shape, silence, failure; and that a stream is the whole, in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm import SamplingParams
from nanovllm.engine.messages import Delta, Finished
from nanovllm.errors import BusyError, ExecutionError, InvalidRequestError, NanoVLLMError
from nanovllm.serve import replies, sse
from nanovllm.serve.answer import Answer, Order, Prompt
from nanovllm.serve.merging import merged
from tests.serve.surface import HI, Live

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 24}


def chunks(events: list[Any], kind: type = replies.ChatChunk) -> list[Any]:
    assert events[-1] == "[DONE]"
    return [msgspec.convert(event, kind) for event in events[:-1]]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("has_usage", [False, True])
def test_the_order_of_a_stream(tiny: Live, n: int, has_usage: bool) -> None:
    body = {"messages": HI, **GREEDY, "n": n, "stream_options": {"include_usage": has_usage}}
    found = chunks(tiny.events(CHAT, body))
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in found}) == 1
    if has_usage:
        assert found[-1].choices == [] and found[-1].usage.completion_tokens == 24 * n
        found.pop()
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in found)
    for index in range(n):
        own = [chunk.choices[0] for chunk in found if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert all(choice.delta.role is None for choice in own[1:])
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]


@pytest.mark.parametrize(
    "fields",
    [
        GREEDY,
        {"seed": 5, "n": 3, "max_tokens": 30},
        {"seed": 6, "max_tokens": 60, "stop": ["a", "e"]},
        {"seed": 7, "max_tokens": 12, "logprobs": True, "top_logprobs": 2},
    ],
)
def test_a_stream_is_the_whole_in_pieces(tiny: Live, fields: dict) -> None:
    whole = tiny.chat(**fields).json()["choices"]
    found = chunks(tiny.events(CHAT, {"messages": HI, **fields}))
    for expected in whole:
        own = [chunk.choices[0] for chunk in found if chunk.choices[0].index == expected["index"]]
        assert "".join(choice.delta.content or "" for choice in own) == expected["message"]["content"]
        assert own[-1].finish_reason == expected["finish_reason"]
        entries = [entry for choice in own if choice.logprobs for entry in choice.logprobs.content]
        assert msgspec.to_builtins(entries) == ((expected["logprobs"] or {}).get("content") or [])


def test_a_text_stream_is_the_whole_in_pieces(tiny: Live) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "seed": 3, "max_tokens": 12, "echo": True}
    whole = tiny.ask(TEXT, body).json()["choices"]
    found = chunks(tiny.events(TEXT, body), replies.TextReply)
    for expected in whole:
        own = [chunk.choices[0] for chunk in found if chunk.choices[0].index == expected["index"]]
        assert "".join(choice.text for choice in own) == expected["text"]
        assert own[-1].finish_reason == "length"


def test_refusals_before_the_first_byte_have_their_status(tiny: Live) -> None:
    answer = tiny.chat([{"role": "user", "content": "x" * 5000}], stream=True)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_frames_are_rendered_whole() -> None:
    frames = sse.ChunkFrames("id", "kind", 1, 'a "model"', 2, has_usage=True)
    text = 'tab\t "quoted" \u2028 \u2029 \x85 é \x00'
    frame = frames.chunk(1, b'"delta":{"content":' + sse.json_text(text) + b"}", None, "stop")
    assert frame.startswith(b"data: ") and frame.endswith(b"\n\n") and len(frame.decode().splitlines()) == 2
    chunk = json.loads(frame[6:])
    assert chunk["choices"] == [{"index": 1, "delta": {"content": text}, "logprobs": None, "finish_reason": "stop"}]
    assert chunk["model"] == 'a "model"' and chunk["usage"] is None


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": HI, "n": 2}), (TEXT, {"prompt": ["a", "a b"], "n": 2})])
def test_the_usage_so_far_in_each_chunk(tiny: Live, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = tiny.events(path, {**body, **GREEDY, "ignore_eos": True, "stream_options": options})[:-1]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24 * len({choice_of(p) for p in parts})
    for index in {choice_of(part) for part in parts}:
        found = [part["usage"] for part in parts if choice_of(part) == index]
        counts = [usage["completion_tokens"] for usage in found]
        assert counts == sorted(counts) and counts[0] < counts[-1] == 24
        assert {u["total_tokens"] - u["completion_tokens"] for u in found} == {found[0]["prompt_tokens"]}
    prompts = [next(p["usage"]["prompt_tokens"] for p in parts if choice_of(p) == i) for i in (0, 2) if path == TEXT]
    assert sum(prompts) == (last["usage"]["prompt_tokens"] if path == TEXT else 0)


def choice_of(part: dict[str, Any]) -> int:
    return part["choices"][0]["index"]


# -- answers without a server: streams that do what a test says ---------------------------------------


class Script:
    """A RequestStream that yields deltas, waits or raises as told."""

    def __init__(self, *acts: Any) -> None:
        self.acts, self.is_closed = acts, False
        self.finished: Finished | None = None

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        for act in self.acts:
            if isinstance(act, Exception):
                raise act
            if isinstance(act, float):
                await asyncio.sleep(act)
            else:
                yield [Delta("r", 0, [1], act)]
        yield [Delta("r", 0, [2], "", "stop")]
        self.finished = Finished("r", 1, 2)

    def close(self) -> None:
        self.is_closed = True


class Text:
    """The plainest rendering."""

    def add(self, batch: Any) -> bytes:
        return "".join(delta.text for _, deltas in batch for delta in deltas).encode()

    def end(self, finished: list[Finished]) -> bytes:
        return b"END%d" % len(finished)


class Client:
    """The other side of an ASGI call."""

    def __init__(self, stalls: bool = False, leaves_after: float | None = None) -> None:
        self.sent: list[Any] = []
        self._stalls, self._leaves_after = stalls, leaves_after

    async def receive(self) -> dict[str, str]:
        if self._leaves_after != 0:
            await asyncio.sleep(self._leaves_after or 3600)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if self._stalls and message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def answer_with(
    client: Client, *streams: Script, is_stream: bool = True, beat_s: float = 60, stall_s: float = 60
) -> BaseException | None:
    left = list(streams)
    engine = SimpleNamespace(submit=lambda ids, params, **more: left.pop(0))
    config = SimpleNamespace(queue_timeout=1, request_timeout=1, heartbeat_interval=beat_s, write_timeout=stall_s)
    ticket = SimpleNamespace(
        request_id="id",
        arrival_ns=0,
        tenant=SimpleNamespace(namespace="", owner=""),
        started=None,
        revise=lambda tokens, n: None,
    )
    order = Order([Prompt([1])] * len(streams), SamplingParams())
    answer = Answer(SimpleNamespace(engine=engine, config=config, traces=None), ticket, order, Text(), is_stream)
    try:
        asyncio.run(asyncio.wait_for(answer({}, client.receive, client.send), 10))
    except NanoVLLMError as error:
        return error
    finally:
        assert all(stream.is_closed for stream in streams if stream not in left)
    return None


def test_silence_is_broken_by_comments() -> None:
    client = Client()
    assert answer_with(client, Script(0.5, "a", 0.3, "b"), beat_s=0.1) is None
    before, _, after = client.body.partition(b"a")
    assert before.count(sse.PING) >= 2 and after.count(sse.PING) >= 1 and after.endswith(b"bEND1")
    assert client.sent[0]["type"] == "http.response.start"  # a comment starts the answer, too


def test_no_comments_within_json() -> None:
    client = Client()
    assert answer_with(client, Script(0.5, "a"), is_stream=False, beat_s=0.05) is None
    assert sse.PING not in client.body


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("error", [BusyError("full"), InvalidRequestError("bad", param="grammar"), ExecutionError("x")])
def test_a_failure_before_the_first_byte_is_the_gates(is_stream: bool, error: NanoVLLMError) -> None:
    client = Client()
    raised = answer_with(client, Script(error), is_stream=is_stream)
    assert raised is error and client.sent == [] and raised.param != "grammar"


def test_a_failure_within_a_stream_is_its_last_event() -> None:
    client = Client()
    assert answer_with(client, Script("a", BusyError("full"), "b")) is None
    assert client.body.startswith(b"adata: {") and b"DONE" not in client.body
    error = json.loads(client.body[len(b"adata: ") :])["error"]
    assert error == {"message": "full", "type": "server_error", "param": None, "code": "server_overloaded"}
    assert client.sent[-1]["more_body"] is False


def test_an_internal_failure_within_a_stream_says_only_the_request_id() -> None:
    client = Client()
    raised = answer_with(client, Script("a", ExecutionError("secret")))
    assert isinstance(raised, ExecutionError)  # for the log
    assert b"secret" not in client.body and b"Request id: id." in client.body


def test_a_sample_that_ended_early_is_no_answer() -> None:
    class Aborted(Script):
        async def __aiter__(self) -> AsyncIterator[list[Delta]]:
            yield [Delta("r", 0, [1], "a", "abort")]

    assert isinstance(answer_with(Client(), Aborted(), is_stream=False), ExecutionError)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("acts", [(9.0,), ("a", 9.0), ("a", "b", 9.0)])
def test_a_client_that_leaves_ends_its_streams(is_stream: bool, acts: tuple) -> None:
    client = Client(leaves_after=0.05)
    assert answer_with(client, Script(*acts), Script(*acts), is_stream=is_stream) is None
    assert b"END" not in client.body


def test_a_client_that_left_while_tokenizing_costs_nothing() -> None:
    client, stream = Client(leaves_after=0), Script("a")
    assert answer_with(client, stream) is None
    assert client.sent == [] and not stream.is_closed  # it was never submitted


def test_a_client_that_takes_nothing_is_given_up() -> None:
    client = Client(stalls=True)
    assert answer_with(client, Script("a", "b"), stall_s=0.1) is None
    assert client.body == b"a"


def test_a_step_is_one_send_for_all_prompts() -> None:
    async def run() -> list[list[int]]:
        return [[number for number, _ in batch] async for batch in merged([Script("a", "b"), Script("a")])]

    batches = asyncio.run(run())
    assert sorted(number for batch in batches for number in batch) == [0, 0, 0, 1, 1]
    assert len(batches) < 5


def test_the_first_failure_of_several_ends_all() -> None:
    client = Client()
    assert answer_with(client, Script("a", 9.0), Script(0.05, BusyError("full"))) is None
    assert b"server_overloaded" in client.body
