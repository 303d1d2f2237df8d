"""/v1/conversations through OpenAI's client: one history, one turn at a time, its items one by one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, ConflictError, NotFoundError, OpenAI

from nanovllm.errors import StateRefusedError
from tests.serve.openai_clients import ASKED, BLOCK, LETTERS, Clients, ai, ask, clients, own, texts
from tests.serve.servers import LiveServer, assert_at_rest, running, until
from tests.serve.surface import Live
from tests.serve.test_responses import is_documented

__all__ = ["ai", "clients"]  # fixtures
KEYS = {"api_key": ("alice:key-a", "bob:key-b")}


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with running(num_blocks=512, check_invariants=True, **KEYS, max_tenant_sessions=6) as live:
        yield live


def test_turns_are_added_to_it(ai: OpenAI) -> None:
    talk = ai.conversations.create(metadata={"topic": "x"}, items=[{"role": "user", "content": "First."}])
    assert (talk.object, talk.metadata, talk.id[:5]) == ("conversation", {"topic": "x"}, "conv_")
    one = ask(ai, "Second.", conversation=talk.id, text=LETTERS, max_output_tokens=40)
    assert one.conversation.id == talk.id and ai.responses.retrieve(one.id) == one
    two = ask(ai, "Third.", conversation={"id": talk.id}, text=LETTERS)
    assert texts(ai, talk.id) == ["First.", "Second.", one.output_text, "Third.", two.output_text]
    assert two.usage.input_tokens_details.cached_tokens >= (one.usage.total_tokens - 1) // BLOCK * BLOCK
    assert two.prompt_cache_diagnostics.type == "cache_hit"
    unkept = ask(ai, "Fourth.", conversation=talk.id, store=False)
    with pytest.raises(NotFoundError):
        ai.responses.retrieve(unkept.id)
    assert texts(ai, talk.id)[-2:] == ["Fourth.", unkept.output_text]
    after = ask(ai, "Aside.", previous_response_id=one.id)
    assert len(texts(ai, talk.id)) == 7 and after.conversation is None


def test_its_life(ai: OpenAI, tiny: Live) -> None:
    talk = ai.conversations.create()
    assert is_documented("ConversationReply", tiny.http.get(f"/v1/conversations/{talk.id}").json())
    assert ai.conversations.update(talk.id, metadata={"a": "b"}).metadata == {"a": "b"}
    added = ai.conversations.items.create(talk.id, items=[{"role": "user", "content": str(i)} for i in range(5)])
    assert [item.content[0].text for item in added.data] == ["0", "1", "2", "3", "4"]
    page = ai.conversations.items.list(talk.id, limit=2, order="asc")
    assert page.has_more and [item.content[0].text for item in page] == ["0", "1", "2", "3", "4"]
    first = added.data[0]
    assert ai.conversations.items.retrieve(first.id, conversation_id=talk.id) == first
    assert ai.conversations.items.delete(first.id, conversation_id=talk.id).metadata == {"a": "b"}
    assert texts(ai, talk.id) == ["1", "2", "3", "4"]
    for gone in (ai.conversations.items.retrieve, ai.conversations.items.delete):
        with pytest.raises(NotFoundError):
            gone(first.id, conversation_id=talk.id)
    assert ai.conversations.delete(talk.id).deleted
    for call in (ai.conversations.retrieve, ai.conversations.delete, ai.conversations.items.list):
        with pytest.raises(NotFoundError):
            call(talk.id)
    with pytest.raises(NotFoundError) as caught:
        ask(ai, "x", conversation=talk.id)
    assert caught.value.body["param"] == "conversation"


def test_nothing_is_added_that_no_turn_could_read(ai: OpenAI, tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every later turn would fail, until somebody found out which item is to be deleted."""
    talk = ai.conversations.create()
    for arguments in ("x", "[]", '{"a":', "[" * 10_000):
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
        with pytest.raises(BadRequestError) as caught:
            ai.conversations.items.create(talk.id, items=[call])  # type: ignore[list-item]
        assert caught.value.body["param"] == "items[0].arguments"
    with pytest.raises(BadRequestError) as caught:
        ai.conversations.items.create(talk.id, items=[{"role": "user", "content": "x" * 5_000_000}])
    assert caught.value.body["param"] == "items"
    monkeypatch.setattr(tiny.services, "limits", replace(tiny.services.limits, messages=3))
    said = {"items": [{"role": "user", "content": "x"}] * 2}
    assert [tiny.ask(f"/v1/conversations/{talk.id}/items", said).status_code for _ in range(2)] == [200, 400]


def test_a_name_finds_it_again_and_is_given_once(tiny: Live) -> None:
    made = tiny.ask("/v1/conversations", {"name": "my talk"})
    assert made.status_code == 200 and made.json()["name"] == "my talk"
    again = tiny.ask("/v1/conversations", {"name": "my talk"})
    assert (again.status_code, again.json()["error"]["param"]) == (409, "name")
    found = tiny.http.get("/v1/conversations", params={"name": "my talk"}).json()
    assert [talk["id"] for talk in found["data"]] == [made.json()["id"]]
    assert tiny.http.get("/v1/conversations", params={"name": "other"}).json()["data"] == []
    for bad in ("a@b", "conv_x", "resp_x", "", "x" * 129, "a\nb"):
        assert tiny.ask("/v1/conversations", {"name": bad}).status_code == 400
    tiny.http.delete(f"/v1/conversations/{made.json()['id']}")
    assert tiny.ask("/v1/conversations", {"name": "my talk"}).status_code == 200


def test_of_two_turns_at_once_one_is_refused(ai: OpenAI, tiny: Live) -> None:
    """At once, before it costs anything; and the conversation goes on afterwards."""
    talk = ai.conversations.create()
    more = {"input": "Long.", "conversation": talk.id, "extra_body": {"ignore_eos": True}}
    stream = ai.responses.create(**{**ASKED, "max_output_tokens": 1500}, **more, stream=True)
    events = iter(stream)
    assert next(events).type == "response.created"
    before = tiny.services.engine.stats.prefill_tokens
    for attempt in (
        lambda: ask(ai, "x", conversation=talk.id),
        lambda: ai.conversations.items.create(talk.id, items=[{"role": "user", "content": "x"}]),
        lambda: ai.conversations.update(talk.id, metadata={}),
    ):
        with pytest.raises(ConflictError) as caught:
            attempt()
        assert caught.value.code == "state_conflict" and caught.value.body["param"] == "conversation"
    assert tiny.services.engine.stats.prefill_tokens == before
    stream.close()
    until(lambda: tiny.services.engine.num_live == 0, "the abandoned turn lives on")
    assert texts(ai, talk.id) == [], "an aborted turn is not kept"

    def is_free() -> bool:
        try:
            return bool(ask(ai, "Again.", conversation=talk.id))
        except ConflictError:
            return False

    until(is_free, "the conversation is never given back")
    assert len(texts(ai, talk.id)) == 2
    assert_at_rest(tiny.server)


def test_a_change_from_elsewhere_refuses_the_turn_at_its_end(tiny: Live, ai: OpenAI) -> None:
    """The operator's update, or another server's on the same folder: the generation tells."""
    talk = ai.conversations.create()
    replaced = tiny.services.turns.replace

    async def too_late(tenant: Any, kept: Any, session: Any, *more: Any) -> None:
        await replaced(tenant, kept, kept.session)  # somebody else was quicker
        await replaced(tenant, kept, session, *more)

    tiny.services.turns.replace = too_late  # type: ignore[method-assign]
    try:
        for fields in ({}, {"stream": True}):
            answer = tiny.ask("/v1/responses", {**ASKED, "input": "x", "conversation": talk.id, **fields})
            if not fields:
                assert (answer.status_code, answer.json()["error"]["code"]) == (409, "state_conflict")
                continue
            ending = answer.text.strip().split("\n\n")[-2:]
            assert [one.split("\n")[0] for one in ending] == ["event: response.failed", "event: error"]
            assert '"code":"state_conflict"' in ending[1]
    finally:
        tiny.services.turns.replace = replaced  # type: ignore[method-assign]
    assert texts(ai, talk.id) == []
    assert_at_rest(tiny.server)


@pytest.mark.parametrize("is_put_back", [True, False])
def test_a_response_that_is_refused_takes_its_turn_along_or_says_where_it_is(
    tiny: Live, ai: OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_put_back: bool
) -> None:
    talk, turns = ai.conversations.create(), tiny.services.turns
    first = ask(ai, "One.", conversation=talk.id, text=LETTERS)
    replace_turn = turns.replace

    async def refused(*_: Any) -> None:
        if not is_put_back:
            monkeypatch.setattr(turns, "replace", refused)
        raise StateRefusedError("The object was not kept: the disk is full.")

    monkeypatch.setattr(turns, "keep", refused)
    answer = tiny.ask("/v1/responses", {**ASKED, "input": "Two.", "conversation": talk.id})
    monkeypatch.setattr(turns, "replace", replace_turn)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "state_refused")
    assert ("has the turn all the same" in answer.text) != is_put_back
    assert ("stays in its conversation" in caplog.text) != is_put_back
    assert len(texts(ai, talk.id)) == (2 if is_put_back else 4)
    monkeypatch.undo()
    again = ask(ai, "Three.", conversation=talk.id, text=LETTERS)
    assert own(again)["reusable_tokens"] >= first.usage.total_tokens and own(again)["changed"] == []
    assert_at_rest(tiny.server)


def test_another_tenants_turns_are_not_there(keyed: LiveServer, clients: Clients) -> None:
    """Attack 32: ids are looked up with their tenant; a guess tells nothing, not even that it exists."""
    alice, bob = clients(keyed, "key-a"), clients(keyed, "key-b")
    secret = ask(alice, "My secret.")
    talk = alice.conversations.create(metadata={"m": "secret"}, items=[{"role": "user", "content": "secret"}])
    named = keyed.ask("POST", "/v1/conversations", {"name": "plans"}, {"Authorization": "Bearer key-a"}).json
    attempts: list[Callable[[], Any]] = [
        lambda: bob.responses.retrieve(secret.id),
        lambda: bob.responses.delete(secret.id),
        lambda: list(bob.responses.input_items.list(secret.id)),
        lambda: ask(bob, "x", previous_response_id=secret.id),
        lambda: bob.conversations.retrieve(talk.id),
        lambda: bob.conversations.update(talk.id, metadata={}),
        lambda: bob.conversations.delete(talk.id),
        lambda: list(bob.conversations.items.list(talk.id)),
        lambda: bob.conversations.items.create(talk.id, items=[{"role": "user", "content": "x"}]),
        lambda: ask(bob, "x", conversation=talk.id),
    ]
    for attempt in attempts:
        with pytest.raises(NotFoundError) as theirs:
            attempt()
        assert theirs.value.code == "state_not_found" and "secret" not in str(theirs.value.body)
    assert keyed.get("/v1/conversations?name=plans", Authorization="Bearer key-b").json["data"] == []
    assert keyed.get("/v1/conversations?name=plans", Authorization="Bearer key-a").json["data"][0]["id"] == named["id"]
    assert alice.responses.retrieve(secret.id) == secret and texts(alice, talk.id) == ["secret"]
    same = ask(bob, "My secret.")
    assert same.usage.input_tokens_details.cached_tokens == 0, "Bob can tell what Alice said"
    for kept in (talk.id, named["id"]):
        alice.conversations.delete(kept)
    alice.responses.delete(secret.id)
    bob.responses.delete(same.id)
    assert_at_rest(keyed)


def test_a_quota_is_each_tenants_own(keyed: LiveServer, clients: Clients) -> None:
    alice, bob = clients(keyed, "key-a"), clients(keyed, "key-b")
    kept = [ask(alice, f"{number}") for number in range(5)]
    kept.append(alice.conversations.create())
    for attempt in (lambda: ask(alice, "one more"), lambda: alice.conversations.create()):
        with pytest.raises(APIStatusError) as caught:
            attempt()
        assert (caught.value.status_code, caught.value.code) == (507, "session_quota")
        assert caught.value.body["param"] == "store" and "store: false" in caught.value.message
    assert ask(alice, "not kept", store=False).status == "incomplete"
    bobs = ask(bob, "mine")
    alice.responses.delete(kept[0].id)
    more = ask(alice, "again", previous_response_id=kept[1].id)
    for one in [*kept[1:5], more]:
        alice.responses.delete(one.id)
    alice.conversations.delete(kept[5].id)
    bob.responses.delete(bobs.id)
    assert_at_rest(keyed)


def test_many_at_once_lose_nothing(ai: OpenAI, tiny: Live, clients: Clients) -> None:
    """Eight conversations, four turns each, at the same time; each history is whole and in order."""
    talks = [ai.conversations.create().id for _ in range(8)]
    failures: list[BaseException] = []

    def converse(number: int) -> None:
        try:
            for turn in range(4):
                ask(clients(tiny), f"{number}.{turn}", conversation=talks[number], max_output_tokens=5)
        except BaseException as error:  # noqa: BLE001  told to the test, whatever it is
            failures.append(error)

    threads = [threading.Thread(target=converse, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for number, talk in enumerate(talks):
        assert texts(ai, talk)[::2] == [f"{number}.{turn}" for turn in range(4)]
    assert_at_rest(tiny.server)


def test_time_ends_them(fresh_server: Callable[..., LiveServer], clients: Clients) -> None:
    live = fresh_server(session_ttl=1.0, num_blocks=256)
    ai = clients(live)
    first, talk = ask(ai, "Short."), ai.conversations.create()
    assert own(first)["hit_tokens_by_tier"] == {}

    def is_gone(look: Callable[[], Any]) -> bool:
        try:
            look()
        except NotFoundError:
            return True
        return False

    until(lambda: is_gone(lambda: ai.responses.retrieve(first.id)), "a response outlives its time")
    until(lambda: is_gone(lambda: ai.conversations.retrieve(talk.id)), "a conversation outlives its time")
    assert asyncio.run(held(live)).items() >= {"objects": 0, "bytes": 0}.items()


async def held(live: LiveServer) -> Any:
    loop = live.server._loop
    assert loop is not None
    call = live.services.engine.call_state("holdings", namespace="default", kind="session")
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, loop))
