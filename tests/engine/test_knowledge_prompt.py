"""Documents in prompts: the same set makes the same prefix, and nothing in a document is more than text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.knowledge_prompt import (
    SLOT,
    TEMPLATE,
    Passage,
    chat_segments,
    ids_of,
    passage_of,
    path_of,
    spans_of,
)
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.models.byte_tokenizer import ByteTokenizer
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.models.loading import load_model_files
from nanovllm.state.objects import PUBLIC, Document

ASK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "When?"}]
FORGED = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|bos|>", "<|im_", "end|>", "|>", "<", "system\n", "\n\n"]
LETTERS = "aé <|_>\n"  # what every vocabulary here can spell, and specials are made of
TEXTS = (
    st.lists(st.sampled_from(FORGED) | st.text(LETTERS, max_size=8), min_size=1, max_size=6).map("".join).filter(bool)
)
FRAMES = st.tuples(TEXTS, TEXTS).map(SLOT.join).filter(lambda frame: frame.count(SLOT) == 1)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    if request.param == "tiny":
        return ByteTokenizer()
    path: Path = request.getfixturevalue("smollm2_path")
    loaded = load_model_files(str(path), progress=False)
    loaded.weights.close()
    return loaded.tokenizer


def specials(tokenizer: ChatTokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.special_ids]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, FRAMES), min_size=1, max_size=4), TEXTS, TEXTS, st.randoms())
def test_a_documents_ids_are_its_own_whatever_stands_beside_it(
    tokenizer: ChatTokenizer, documents: list[tuple[str, str]], system: str, question: str, rng: random.Random
) -> None:
    passages = [
        passage_of(tokenizer, Document(text, (), "", frame), f"d{i}", PUBLIC if i % 2 else "own")
        for i, (text, frame) in enumerate(documents)
    ]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    segments = chat_segments(tokenizer, messages, passages)
    shuffled = rng.sample(passages, len(passages))
    assert chat_segments(tokenizer, messages, [*shuffled, shuffled[0]]) == segments, "an order of its own, once each"
    first, *middle, last = segments
    assert [s.name for s in middle] == [
        f"document d{i}" for i in (*range(1, len(passages), 2), *range(0, len(passages), 2))
    ]
    for segment in middle:
        own = next(p for p in passages if segment.name == f"document {p.label}")
        assert segment.content == list(own.token_ids) and not specials(tokenizer, list(own.token_ids))
    plain = tokenizer.encode_chat([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    assert specials(tokenizer, ids_of(segments)) == specials(tokenizer, plain), "no control token is forged"
    assert tokenizer.decode(ids_of([first]), False).endswith(system) and question in tokenizer.decode(ids_of([last]))
    spans = spans_of(segments)
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert (spans[0].start, spans[-1].end) == (0, len(ids_of(segments)))


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), TEXTS, TEXTS)
def test_a_turn_with_the_same_documents_goes_on_in_its_own_tokens(
    tokenizer: ChatTokenizer, documents: list[str], answer: str, question: str
) -> None:
    passages = [passage_of(tokenizer, Document(text), f"d{i}") for i, text in enumerate(documents)]
    prompt = ids_of(chat_segments(tokenizer, ASK, passages))
    made = [i for letter in answer for i in tokenizer.encode(letter, parse_special=False, add_bos=False)]
    known = [*prompt, *made, tokenizer.special_tokens["<|im_end|>"]]
    history = [*ASK, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    fresh, segments = (
        chat_segments(tokenizer, history, passages),
        chat_segments(tokenizer, history, passages, known=known),
    )
    assert ids_of(segments)[: len(known)] == known and segments[:-1] == fresh[:-1]
    assert tokenizer.decode(ids_of(segments), False) == tokenizer.decode(ids_of(fresh), False)
    other = [*passages, passage_of(tokenizer, Document("One more."), "a")]
    assert chat_segments(tokenizer, history, other, known=known) == chat_segments(tokenizer, history, other)


def test_the_path_of_an_upload_begins_every_prompt_that_says_nothing_else_first(tokenizer: ChatTokenizer) -> None:
    document, path = path_of(tokenizer, Document("The library opens at 8.", (), "Be short."), "lib@1", 256)
    assert [s.name for s in path] == ["system", "document lib@1"] and ids_of(path) == document.token_ids
    passage = passage_of(tokenizer, document, "lib@1")
    for messages in (ASK, ASK[1:], [*ASK, {"role": "assistant", "content": "8"}, {"role": "user", "content": "Sure?"}]):
        ids = ids_of(chat_segments(tokenizer, messages, [passage]))
        assert ids[: len(document.token_ids)] == document.token_ids
        assert tokenizer.decode(ids).count(f"Be short.{TEMPLATE.replace(SLOT, document.text)}") == 1
    other = ids_of(chat_segments(tokenizer, [{"role": "system", "content": "Other."}, *ASK[1:]], [passage]))
    assert other[: len(document.token_ids)] != document.token_ids


def test_a_document_that_leaves_no_room_for_a_question_is_refused(tokenizer: ChatTokenizer) -> None:
    document = Document("word " * 40)
    whole = len(
        ids_of(chat_segments(tokenizer, [{"role": "user", "content": "?"}], [passage_of(tokenizer, document, "d")]))
    )
    assert path_of(tokenizer, document, "d", whole + 1)[1]
    with pytest.raises(ContextLengthError, match="Nothing was kept") as refused:
        path_of(tokenizer, document, "d", whole)
    assert refused.value.param == "text"


@pytest.mark.parametrize("template", ["", "no slot", f"{SLOT}{SLOT}", "{Document}"])
def test_a_template_has_one_slot(template: str) -> None:
    if not template:
        assert passage_of(ByteTokenizer(), Document("x"), "d").token_ids == tuple(b"\n\nx")
        return
    with pytest.raises(InvalidRequestError) as refused:
        passage_of(ByteTokenizer(), Document("x", (), "", template), "d")
    assert refused.value.param == "template"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | reverse | list | join('-') }}{% endfor %}",
    ],
    ids=["dropped", "doubled", "torn"],
)
def test_a_model_without_a_place_for_documents_refuses_them(template: str) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = template
    passages = [passage_of(tokenizer, Document(text), text) for text in "ab"]
    with pytest.raises(InvalidRequestError, match="no place for knowledge") as refused:
        chat_segments(tokenizer, ASK, passages)
    assert refused.value.param == "knowledge"


def test_the_system_message_is_one_text() -> None:
    parts = [{"role": "system", "content": [{"type": "text", "text": "x"}]}]
    with pytest.raises(InvalidRequestError, match="one text"):
        chat_segments(ByteTokenizer(), parts, [Passage("d", "", (1,))])


def test_the_first_documents_system_text_stands_where_the_request_has_none() -> None:
    tokenizer = ByteTokenizer()
    passages = [Passage("a", "", (1,)), Passage("b", "", (2,), "B's."), Passage("c", "", (3,), "C's.")]
    for given_system, shown in ((ASK[1:], "B's."), (ASK, "Be short.")):
        (system, *_) = chat_segments(tokenizer, given_system, passages)
        assert tokenizer.decode(ids_of([system])).endswith(shown)
