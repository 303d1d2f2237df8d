"""What a turn goes on from: the tokens of the turn before, with documents, after deletions, behind odd answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from nanovllm.serve.turn_history import History, without_item
from nanovllm.state.objects import Session
from tests.serve.openai_clients import BLOCK, LETTERS, Clients, ask, clients, own, texts
from tests.serve.servers import LiveServer, running, thread_only, until
from tests.serve.test_turn_store import DELETED_S, HERON, lies_anywhere, store_of

__all__ = ["clients"]  # a fixture
DOCUMENTS = "/state/knowledge"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A folder and memory beneath the pool."""
    folder = tmp_path_factory.mktemp("state")
    with running(state_dir=str(folder), num_blocks=512, max_model_len=1024, state_host_memory="8MiB") as started:
        yield started


@pytest.fixture
def ai(live: LiveServer, clients: Clients) -> OpenAI:
    return clients(live)


def reason(answer: Any) -> tuple[str | None, list[str]]:
    return own(answer)["miss_reason"], own(answer)["changed"]


@thread_only("it looks into the engine's store")
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_deleted_item_leaves_no_token_and_no_block(live: LiveServer, ai: OpenAI, place: int) -> None:
    """Of the second of two turns: its question or its answer; or of the first, which takes all that follows along."""
    talk, store = ai.conversations.create(), store_of(live)
    one = ask(ai, f"{place} {HERON}", conversation=talk.id, store=False, text=LETTERS, max_output_tokens=40)
    two = ask(ai, f"Nobody may know {place}.", conversation=talk.id, store=False, text=LETTERS, max_output_tokens=50)
    state_id = talk.id.removeprefix("conv_")
    tokens, chain = store.get(state_id, "default").token_ids, store.find(state_id, "default").chain
    left = {0: 0, 2: one.usage.total_tokens, 3: two.usage.input_tokens}[place]
    assert len(tokens) == two.usage.total_tokens and len(chain) == len(tokens) // BLOCK
    item = list(ai.conversations.items.list(talk.id, order="asc"))[place]
    ai.conversations.items.delete(item.id, conversation_id=talk.id)
    assert store.get(state_id, "default").token_ids == tokens[:left]
    gone = chain[left // BLOCK :]
    until(lambda: not any(lies_anywhere(live, (digest,)) for digest in gone), "blocks outlive their item", DELETED_S)
    assert all(lies_anywhere(live, (digest,)) for digest in chain[: left // BLOCK])
    after = ask(ai, "And?", conversation=talk.id, text=LETTERS)
    assert reason(after) == ("item_deleted", []) and own(after)["reusable_tokens"] <= left
    assert after.prompt_cache_diagnostics.reason == "input_changed", "OpenAI has no word for it"
    again = ask(ai, "And?", conversation=talk.id, text=LETTERS)
    assert reason(again) == (None, []), "it is told once"


def test_what_was_added_by_hand_is_deleted_without_a_miss(ai: OpenAI) -> None:
    talk = ai.conversations.create()
    one = ask(ai, HERON, conversation=talk.id, text=LETTERS)
    added = ai.conversations.items.create(talk.id, items=[{"role": "user", "content": "Never mind."}])
    ai.conversations.items.delete(added.data[0].id, conversation_id=talk.id)
    after = ask(ai, "And?", conversation=talk.id, text=LETTERS)
    assert reason(after) == (None, []) and own(after)["reusable_tokens"] == one.usage.total_tokens
    assert "Never mind." not in texts(ai, talk.id)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_token_stays_known_that_was_computed_with_a_deleted_item(data: st.DataObject) -> None:
    """A token stands for the items that were there when it was computed; any may be rewritten by a later turn."""
    talk = Session([], (), {})
    seen: dict[int, frozenset[int]] = {}  # token -> items that it may tell of
    number = iter(range(10**6))
    for _ in range(data.draw(st.integers(1, 8))):
        if talk.messages and data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(talk.messages) - 1))
            gone, talk = talk.messages[place]["n"], without_item(talk, place)
            assert all(gone not in seen[token] for token in talk.token_ids)
            continue
        history = History.of(talk.messages, talk.token_ids, talk.facts)
        asked = [*talk.messages, *({"n": next(number)} for _ in range(data.draw(st.integers(1, 2))))]
        kept = talk.token_ids[: data.draw(st.integers(0, len(talk.token_ids)))]
        prompt = [*kept, *(next(number) for _ in range(data.draw(st.integers(1, 3))))]
        seen |= {token: frozenset(item["n"] for item in asked) for token in prompt if token not in seen}
        whole = [*asked, {"n": next(number)}]
        made = [*prompt, next(number)]
        seen[made[-1]] = frozenset(item["n"] for item in whole)
        facts = history.facts_after(len(asked), len(prompt), len(whole), made)
        talk = Session(whole, made, facts)


@thread_only("it looks into the engine's store")
def test_turns_with_the_same_documents_go_on_in_their_own_tokens(live: LiveServer, ai: OpenAI) -> None:
    """Also where the model's tokens are not those of its text: here bytes that are no text."""
    for name in ("b", "a"):
        body = {"name": name, "text": f"The {name} opens at 8. " * 3, "wait": True}
        assert live.ask("POST", DOCUMENTS, body).status == 200
    specials = live.services.engine.tokenizer.special_ids
    before = first_like(
        live,
        ai,
        lambda ids, text: "\ufffd" in text and not specials & {*ids},
        max_output_tokens=20,
        extra_body={"knowledge": ["b", "a"]},
    )
    for names in (["a", "b"], ["b", "a", "b"]):
        after = ask(ai, "Sure?", previous_response_id=before.id, extra_body={"knowledge": names}, text=LETTERS)
        assert reason(after) == (None, []) and own(after)["reusable_tokens"] == before.usage.total_tokens
        whole = (before.usage.total_tokens - 1) // BLOCK * BLOCK
        assert after.usage.input_tokens_details.cached_tokens >= whole
        before = after
    for names in (["a"], None):
        other = ask(ai, "Sure?", previous_response_id=before.id, extra_body={"knowledge": names}, text=LETTERS)
        assert reason(other) == ("knowledge_changed", ["knowledge"])
        assert other.prompt_cache_diagnostics.reason == "input_changed"
    both = ask(ai, "?", previous_response_id=before.id, instructions="x", extra_body={"knowledge": ["a"]}, text=LETTERS)
    assert reason(both) == ("input_changed", ["instructions", "knowledge"])
    assert live.ask("POST", DOCUMENTS, {"name": "a", "text": "It opens at 9.", "wait": True}).status == 200
    newer = ask(ai, "Sure?", previous_response_id=before.id, extra_body={"knowledge": ["a", "b"]}, text=LETTERS)
    assert reason(newer) == ("knowledge_changed", ["knowledge"]), "the same name, another text"
    for name in ("a", "b"):
        assert live.ask("DELETE", f"{DOCUMENTS}/{name}").status == 200


@thread_only("it looks into the engine's store")
def test_an_answer_with_control_tokens_is_a_miss_that_says_so(live: LiveServer, ai: OpenAI) -> None:
    """Its text does not show them, and the next prompt is made of texts."""
    specials = live.services.engine.tokenizer.special_ids
    first = first_like(live, ai, lambda ids, text: bool(specials & {*ids[:-1]}), max_output_tokens=60)
    after = ask(ai, "And?", previous_response_id=first.id, text=LETTERS)
    assert reason(after) == ("history_rewritten", []) and after.prompt_cache_diagnostics.reason == "input_changed"
    assert first.usage.input_tokens <= own(after)["reusable_tokens"] < first.usage.total_tokens
    third = ask(ai, "And?", previous_response_id=after.id, text=LETTERS)
    assert reason(third) == (None, []), "from then on it goes on in the tokens of the prompt"


def first_like(live: LiveServer, ai: OpenAI, is_wanted: Callable[[list[int], str], bool], **more: Any) -> Any:
    """A first turn with such an answer, given its token ids and its text; the tiny model says anything."""
    wild = {"ignore_eos": True, **more.pop("extra_body", {})}
    for seed in range(50):
        answer = ask(ai, "Go.", temperature=1.5, extra_body={**wild, "seed": seed}, **more)
        ids = store_of(live).get(answer.id, "default").token_ids[answer.usage.input_tokens :]
        if is_wanted([*ids], answer.output_text):
            return answer
    raise AssertionError("no such answer")
