"""Text that grows token by token: whole characters, whole stop strings, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.detokenizer import MAX_HELD_TOKENS, IncrementalDetokenizer, StopFilter
from nanovllm.engine.outputs import SequenceOutput
from nanovllm.engine.sequence import Sequence
from nanovllm.models.byte_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def pieces(ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.flush()]


def grow(text: str | bytes, **params: Any) -> tuple[SequenceOutput, list[str], str]:
    """Feed a text byte by byte as one sequence's tokens; its output, the increments, and the finish_reason."""
    data = text.encode() if isinstance(text, str) else text
    seq = Sequence([65], SamplingParams(max_tokens=len(data), **params), block_size=4)
    seq.max_total_tokens = 1 + len(data)
    output, shown = SequenceOutput(seq, TOKENIZER), []
    for token_id in data:
        seq.append_token(token_id)
        reason = output.finish_check(token_id)
        if reason is not None:
            output.finish(reason)
        shown.append(output.take()[1])
        if reason is not None:
            return output, shown, reason
    raise AssertionError("the last token ends a sequence")


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    assert pieces(list("a🦜b".encode())) == ["a", "", "", "", "🦜", "b", ""]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_increments_make_up_the_text(text: str) -> None:
    assert "".join(pieces(list(text.encode("utf-8", "ignore")))) == text.encode("utf-8", "ignore").decode()


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=40) | st.text("\u0101😀\ufffd", max_size=8).map(lambda text: b"\xff" * 5 + text.encode()[:-1])
)
def test_any_bytes_make_increments_without_error(data: bytes) -> None:
    """Bytes that never become UTF-8 are shown as replacement characters instead of being held for ever."""
    shown = pieces(list(data))
    assert "".join(shown) == TOKENIZER.decode(list(data))
    if len(data) > 2 * MAX_HELD_TOKENS:
        assert any(shown[:-1])


def test_incomplete_bytes_at_the_end_become_a_replacement_character() -> None:
    assert "".join(pieces(list("é".encode())[:1])) == "�"


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    output, shown, reason = grow("one two STOP three", stop="STOP")
    assert (output.completion.text, reason, output.completion.stop_reason) == ("one two ", "stop", "STOP")
    assert "".join(shown) == "one two " and len(output.completion.token_ids) == len("one two STOP")


def test_include_stop_keeps_it() -> None:
    assert grow("ab END cd", stop=["END"], include_stop_str_in_output=True)[0].completion.text == "ab END"


def test_the_earliest_stop_string_wins() -> None:
    assert grow("xxabyy", stop=["by", "ab"])[0].completion.stop_reason == "ab"


def test_what_looked_like_a_stop_string_is_shown_at_the_end() -> None:
    output, shown, reason = grow("hello ST", stop="STOP")
    assert (output.completion.text, "".join(shown), reason) == ("hello ST", "hello ST", "length")
    assert shown[-3:] == [" ", "", "ST"], "held while it could become the stop string"


def test_a_stop_string_before_min_tokens_ends_nothing() -> None:
    output, _, reason = grow("abXcdX rest", stop="X", min_tokens=4)
    assert (output.completion.text, reason) == ("abXcd", "stop")


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab", max_size=25),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_stop_filter_cuts_at_the_first_match(text: str, stops: list[str], size: int) -> None:
    """Against the plain definition: the first character by which some stop string is complete."""
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.add(text[i : i + size]) for i in range(0, len(text), size)) + stop_filter.flush()
    ends = [i for i in range(1, len(text) + 1) if any(text[:i].endswith(stop) for stop in stops)]
    if not ends:
        assert shown == text and stop_filter.matched is None
        return
    end = ends[0]
    cuts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
    assert stop_filter.matched is not None and shown == text[: min(cuts)]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_shown_on_demand(skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=skip)
    text = "".join(detokenizer.add(t) for t in [72, 258, 105]) + detokenizer.flush()
    assert text == ("Hi" if skip else "H<|im_start|>i")
