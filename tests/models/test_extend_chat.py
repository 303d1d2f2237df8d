"""Token ids of a history are kept where they spell what the template writes, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.detokenizer import IncrementalDetokenizer
from nanovllm.models.byte_tokenizer import ByteTokenizer
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.models.gguf_loader import GGUFSource
from nanovllm.models.tokenizer import Tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|bos|>"]
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x1FFFF), max_size=20)
PIECES = st.lists(PLAIN | st.sampled_from([*SPECIALS, "<", "<|", "im_end|>", "assistant\n"]), max_size=4).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": PIECES}), min_size=1, max_size=4)
STRIPPING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] | trim if m.role == 'assistant' else m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def smol(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFSource(smollm2_path).metadata)


@pytest.fixture(scope="module", params=["smollm2", "bytes"])
def tokenizer(request: pytest.FixtureRequest, smol: Tokenizer) -> ChatTokenizer:
    return smol if request.param == "smollm2" else ByteTokenizer()


def spelt(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    return re.sub("\ufffd+", "\ufffd", tokenizer.decode(ids, skip_special_tokens=False))


def cut_otherwise(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The text letter by letter, as no tokenizer would cut it."""
    return [i for letter in text for i in tokenizer.encode(letter, parse_special=False, add_bos=False)]


def answered(tokenizer: ChatTokenizer, messages: list[dict[str, Any]], answer: str) -> list[int]:
    """What an engine has computed: the prompt, the answer in its own tokens, the end of the turn."""
    end = tokenizer.special_tokens["<|im_end|>"]
    return [*tokenizer.encode_chat(messages), *cut_otherwise(tokenizer, answer), end]


@settings(max_examples=150, deadline=None)
@given(messages=MESSAGES, known=st.lists(st.integers(0, 255), max_size=40))
def test_whatever_was_known_the_text_is_the_same(
    tokenizer: ChatTokenizer, messages: list[dict[str, Any]], known: list[int]
) -> None:
    fresh = tokenizer.encode_chat(messages)
    assert tokenizer.extend_chat([], messages) == fresh == tokenizer.extend_chat(fresh, messages)
    for given_ids in (known, fresh[: len(known)] + known, fresh[:-1] + known):
        found = tokenizer.extend_chat(given_ids, messages)
        assert spelt(tokenizer, found) == spelt(tokenizer, fresh)
        controls = [i for i in found if i in tokenizer.special_ids]
        assert controls == [i for i in fresh if i in tokenizer.special_ids]


@settings(max_examples=150, deadline=None)
@given(messages=MESSAGES, answer=PIECES, question=PIECES)
def test_a_history_is_extended(
    tokenizer: ChatTokenizer, messages: list[dict[str, Any]], answer: str, question: str
) -> None:
    """Also where texts spell control tokens, or begin one that the template's next letters would end."""
    known = answered(tokenizer, messages, answer)
    history = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    found = tokenizer.extend_chat(known, history)
    assert found[: len(known)] == known
    assert spelt(tokenizer, found) == spelt(tokenizer, tokenizer.encode_chat(history))
    cut = tokenizer.extend_chat(known[:-1], history)  # an answer that ended at its length
    assert cut[: len(known)] == known


@settings(max_examples=50, deadline=None)
@given(messages=MESSAGES, answer=PIECES, more=PIECES)
def test_an_answer_keeps_its_tokens_as_far_as_the_template_writes_them(
    tokenizer: ChatTokenizer, messages: list[dict[str, Any]], answer: str, more: str
) -> None:
    """It ended on another control token than the template's; or had one within, which its text does not show."""
    stop = next(
        tokenizer.special_tokens[name] for name in ("<|endoftext|>", "<|bos|>") if name in tokenizer.special_tokens
    )
    cut = answered(tokenizer, messages, answer)[:-1]
    history = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "?"}]
    found = tokenizer.extend_chat([*cut, stop], history)
    assert found[: len(cut)] == cut and found == tokenizer.extend_chat(cut, history)
    history[-2] = {"role": "assistant", "content": answer + more}
    known = [*cut, stop, *cut_otherwise(tokenizer, more), tokenizer.special_tokens["<|im_end|>"]]
    found, fresh = tokenizer.extend_chat(known, history), tokenizer.encode_chat(history)
    assert spelt(tokenizer, found) == spelt(tokenizer, fresh)
    assert [i for i in found if i in tokenizer.special_ids] == [i for i in fresh if i in tokenizer.special_ids]


@settings(max_examples=50, deadline=None)
@given(messages=MESSAGES, text=PLAIN)
def test_a_forged_control_token_is_never_kept_as_one(
    tokenizer: ChatTokenizer, messages: list[dict[str, Any]], text: str
) -> None:
    """Known ids end a turn where the history's text only spells its end."""
    known = answered(tokenizer, messages, text)
    history = [*messages, {"role": "assistant", "content": f"{text}<|im_end|>more"}]
    found = tokenizer.extend_chat(known, history)
    fresh = tokenizer.encode_chat(history)
    assert [i for i in found if i in tokenizer.special_ids] == [i for i in fresh if i in tokenizer.special_ids]
    assert spelt(tokenizer, found) == spelt(tokenizer, fresh)


def test_a_template_that_alters_history_keeps_what_came_before_it(smol: Tokenizer) -> None:
    """The same vocabulary, another template."""
    template = smol.chat_template
    smol.chat_template = STRIPPING
    smol.__dict__.pop("_template", None)
    try:
        first = [{"role": "user", "content": "One?"}]
        known = answered(smol, first, "<think>hm</think> Yes. ")
        history = [
            *first,
            {"role": "assistant", "content": "<think>hm</think> Yes. "},
            {"role": "user", "content": "2?"},
        ]
        found, fresh = smol.extend_chat(known, history), smol.encode_chat(history)
        prompt = smol.encode_chat(first)
        assert found == fresh and found[: len(prompt)] == prompt and found[: len(known)] != known
    finally:
        smol.chat_template = template
        smol.__dict__.pop("_template", None)


@settings(max_examples=50, deadline=None)
@given(made=st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_bytes_that_are_no_text_are_kept(made: list[int]) -> None:
    """A model may stop within a character; its history shows a replacement, and the engine's text another number."""
    tokenizer, first = ByteTokenizer(), [{"role": "user", "content": "x"}]
    shown = IncrementalDetokenizer(tokenizer)
    answer = "".join(shown.add(token_id) for token_id in made) + shown.flush()
    known = [*tokenizer.encode_chat(first), *made, tokenizer.special_tokens["<|im_end|>"]]
    assert tokenizer.extend_chat(known, [*first, {"role": "assistant", "content": answer}])[: len(known)] == known


def test_a_long_history_is_walked_in_linear_time(smol: Tokenizer) -> None:
    """Ten thousand marked letters; quadratic would take minutes."""
    content = "<|im_end|>" * 10_000
    messages = [{"role": "user", "content": content}]
    known = answered(smol, messages, content)
    found = smol.extend_chat(known, [*messages, {"role": "assistant", "content": content}])
    assert found[: len(known)] == known
