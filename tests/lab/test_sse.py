"""Events come out the same however the bytes were cut, and nothing a server sends breaks the reader."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import RemoteError
from nanovllm.lab import sse
from nanovllm.lab.sse import EventParser
from nanovllm.lab.streamed_answer import StreamedAnswer
from tests.lab.scripted_server import DONE, ROLE, event, piece, usage

LETTERS = "a :\t\x00\x85é\u2028世😀"  # one to four bytes, and what other parsers take for a line's end


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(
    st.lists(st.text(LETTERS, max_size=8)),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 10**6)),
)
def test_cuts_change_nothing(texts: list[str], end: str, at: list[int]) -> None:
    """In the middle of a character, between CR and LF, inside a name: anywhere."""
    stream = "".join(f": a comment{end}event: x{end}data: {text}{end}id: 1{end}{end}" for text in texts).encode()
    parser = EventParser()
    assert [data for chunk in cut(stream, at) for data in parser.feed(chunk)] == texts


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data:no space\n\n", ["no space"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b": ping\n\n: ping\n\n", []),
        (b"data: no blank line\n", []),
        (b"data: {}\n\ndata: {}\n\n", ["{}", "{}"]),
        (b'error: {"message": "old llama.cpp"}\n\n', ['{"message": "old llama.cpp"}']),
        (b"data: \xff\n\n", ["�"]),
        (b"data\n\n", [""]),
    ],
)
def test_what_an_event_is(stream: bytes, events: list[str]) -> None:
    assert EventParser().feed(stream) == events


@pytest.mark.parametrize("stream", [b"x" * 64, b"data: 12345678\n" * 8, b"data: " + b"x" * 64 + b"\n"])
def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch, stream: bytes) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 40)
    parser = EventParser()
    with pytest.raises(RemoteError) as caught:
        for byte in stream:
            parser.feed(bytes([byte]))
    assert caught.value.code == "event_too_long"


STREAM = ROLE + piece("Gr") + piece("üß 世") + piece("", "stop") + usage(9, 2, 4) + DONE


@given(st.lists(st.integers(0, len(STREAM))))
def test_an_answer_is_the_same_however_it_was_cut(at: list[int]) -> None:
    answer, texts = StreamedAnswer(), []
    for time_ns, chunk in enumerate(cut(STREAM, at)):
        texts.append(answer.feed(chunk, time_ns))
    assert "".join(texts) == "Grüß 世" and len(answer.text_ns) == 2
    assert (answer.finish_reason, answer.is_done) == ("stop", True)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens) == (9, 2, 4)


def test_times_are_those_of_the_chunk_that_completed_the_event() -> None:
    answer = StreamedAnswer()
    first, second = piece("a"), piece("b")
    for at_ns, chunk in ((10, ROLE), (20, first[:-1]), (30, first[-1:]), (40, second + second + b": ping\n\n")):
        answer.feed(chunk, at_ns)
    assert answer.text_ns == [30, 40, 40] and answer.last_choice_ns == 40 and not answer.is_complete


def test_thoughts_are_tokens_but_not_said() -> None:
    answer = StreamedAnswer()
    thought = event({"choices": [{"delta": {"reasoning_content": "Hm."}}]})
    assert answer.feed(thought + piece("Yes."), 7) == "Yes." and answer.text_ns == [7, 7]


def test_nothing_after_done_is_heard() -> None:
    answer = StreamedAnswer()
    assert answer.feed(DONE + piece("late") + event(b"no json"), 1) == "" and answer.is_complete


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"no json", "not_json"),
        (b"[1, 2]", "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"1" * 10_000, "not_json"),
        (b'{"error": {"message": "gone wrong", "code": "execution_failed"}}', "execution_failed"),
        (b'{"error": "gone wrong"}', "server_error"),
        (b'{"error": {"code": 500}}', "500"),
    ],
)
def test_error_events(data: bytes, code: str) -> None:
    with pytest.raises(RemoteError) as caught:
        StreamedAnswer().feed(event(data), 0)
    assert caught.value.code == code
    assert b"gone wrong" not in data or "gone wrong" in str(caught.value)


NAMES = ["choices", "delta", "content", "text", "finish_reason", "usage", "prompt_tokens", "prompt_tokens_details"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(LETTERS, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*NAMES, "error"]), JSON))
def test_any_shape_means_something_or_is_refused(value: object) -> None:
    answer = StreamedAnswer()
    try:
        text = answer.feed(event(json.dumps(value).encode()), 5)
    except RemoteError:
        return
    assert isinstance(text, str) and set(answer.text_ns) <= {5}
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens)
    assert all(count is None or 0 <= count < 2**53 for count in counts)
