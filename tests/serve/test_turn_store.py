"""Stored turns on a real folder: over a restart, a kill -9, a deletion, a shutdown, a disk that takes nothing."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, APIStatusError, NotFoundError

from nanovllm.errors import TierError
from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from tests.serve.openai_clients import ASKED, BLOCK, LETTERS, Clients, ask, clients, own, texts
from tests.serve.servers import (
    CHAT,
    COMPLETIONS,
    LiveServer,
    ServerProcess,
    assert_at_rest,
    running,
    thread_only,
    until,
)

__all__ = ["clients"]  # a fixture
Process = Callable[..., ServerProcess]
HERON = "the blue heron nests behind the old mill"
DELETED_S = 5.0


def store_of(live: LiveServer) -> StateStore:
    assert live.engine is not None
    store: StateStore = live.engine.parts.state.store
    return store


def lies_anywhere(live: LiveServer, chain: tuple[bytes, ...]) -> bool:
    plane = store_of(live).plane
    in_tiers = any(any(place.tier.contains(list(chain))) for place in plane.places.values())
    return in_tiers or any(plane.device is not None and plane.device.holds(digest) for digest in chain)


def is_in_files(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_restart_goes_on_where_it_stopped(tmp_path: Path, clients: Clients) -> None:
    with running(state_dir=str(tmp_path), num_blocks=256, state_load="always") as live:
        ai = clients(live)
        talk = ai.conversations.create(metadata={"kept": "yes"})
        first = ask(ai, HERON, conversation=talk.id, text=LETTERS, max_output_tokens=60)
        alone = ask(ai, "Another.")
    with running(state_dir=str(tmp_path), num_blocks=256, state_load="always") as live:
        ai = clients(live)
        assert ai.responses.retrieve(first.id) == first and ai.responses.retrieve(alone.id) == alone
        assert ai.conversations.retrieve(talk.id).metadata == {"kept": "yes"}
        again = ask(ai, "And?", conversation=talk.id, text=LETTERS)
        assert texts(ai, talk.id) == [HERON, first.output_text, "And?", again.output_text]
        whole = (first.usage.total_tokens - 1) // BLOCK * BLOCK
        assert own(again)["hit_tokens_by_tier"] == {"disk": whole} and own(again)["miss_reason"] is None
        assert_at_rest(live)


def test_what_a_client_has_seen_end_outlives_kill_9(tmp_path: Path, process: Process, clients: Clients) -> None:
    """Killed at the very moment the last event has arrived: text and KV are there; of a named chat the KV."""
    flags = ("--state-dir", str(tmp_path), "--state-load", "always")
    server = process(*flags)
    stream = ask(clients(server), HERON, stream=True, text=LETTERS, max_output_tokens=60)
    last = list(stream)[-1]
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"And {HERON}."}],
        "max_tokens": 60,
        "session_id": "s",
    }
    chat["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": LETTERS["format"]["schema"]},
    }
    said = server.ask("POST", CHAT, chat).json
    server.signal(signal.SIGKILL)
    server.wait()
    server = process(*flags)
    ai = clients(server)
    assert ai.responses.retrieve(last.response.id) == last.response
    after = ask(ai, "And?", previous_response_id=last.response.id)
    whole = (last.response.usage.total_tokens - 1) // BLOCK * BLOCK
    assert own(after)["hit_tokens_by_tier"] == {"disk": whole}
    chat["messages"].append({"role": "assistant", "content": said["choices"][0]["message"]["content"]})
    found = server.ask("POST", CHAT, chat).json["usage"]["nanovllm"]["hit_tokens_by_tier"]
    assert found["disk"] > said["usage"]["prompt_tokens"] // BLOCK * BLOCK


@thread_only("it slows the engine's tier")
def test_the_kv_of_a_named_session_is_written_before_its_answers_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chat, a completion's every sample and a turn that is not kept; but no longer than the server waits."""
    with running(state_dir=str(tmp_path), num_blocks=512, write_behind_timeout=5.0) as live:
        disk = store_of(live).plane.places["disk"].tier
        write, gate = disk.write, threading.Event()

        def held(items: Any) -> None:
            gate.wait(20)
            write(items)

        monkeypatch.setattr(disk, "write", held)
        named = {"max_tokens": 20, "ignore_eos": True, "session_id": "s", "cache_salt": "salt"}
        for path, body in (
            (CHAT, {**named, "messages": [{"role": "user", "content": HERON}], "stream": True}),
            (COMPLETIONS, {**named, "prompt": [f"One {HERON}", f"Two {HERON}"], "n": 2, "temperature": 1}),
            ("/v1/responses", {**ASKED, "input": f"Three {HERON}", "store": False, "prompt_cache_key": "s"}),
        ):
            gate.clear()
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(live.ask, "POST", path, body)
                until(lambda: somebody_waits(live), "it does not wait for its KV")
                assert not asked.done() and not is_written(live), path
                gate.set()
                assert asked.result().status == 200
            assert is_written(live), path
        gate.clear()
        assert live.ask("POST", COMPLETIONS, {**named, "session_id": None, "prompt": f"Four {HERON}"}).status == 200
        assert not is_written(live), "whoever names no session does not wait"
        impatient = replace(live.services.turns.config, write_behind_timeout=0.2)
        monkeypatch.setattr(live.services.turns, "config", impatient)
        assert live.ask("POST", COMPLETIONS, {**named, "prompt": f"Five {HERON}"}).status == 200, "nor does any forever"
        assert not is_written(live)
        gate.set()


def somebody_waits(live: LiveServer) -> bool:
    """For blocks to be written."""
    assert live.engine is not None
    return not live.engine.parts.state.written.is_empty


def is_written(live: LiveServer) -> bool:
    """No block waits to be written, and none is being written."""
    assert live.engine is not None
    is_empty: bool = live.engine.parts.state.behind.is_empty
    return is_empty


@thread_only("it looks into the engine's store")
def test_a_deletion_leaves_no_byte_in_any_tier(tmp_path: Path, clients: Clients) -> None:
    with running(state_dir=str(tmp_path), num_blocks=256, state_host_memory="8MiB") as live:
        ai, store = clients(live), store_of(live)
        kept = ask(ai, "A turn that stays.", text=LETTERS)
        gone = ask(ai, HERON, text=LETTERS, max_output_tokens=60)
        child = ask(ai, "More.", previous_response_id=kept.id)
        chain = store.find(gone.id, "default").chain
        shared = store.find(kept.id, "default").chain
        assert len(chain) >= 4 and lies_anywhere(live, chain) and is_in_files(tmp_path, HERON)
        started = time.monotonic()
        ai.responses.delete(gone.id)
        until(lambda: not lies_anywhere(live, chain[2:]), "blocks outlive their only owner", DELETED_S)
        until(lambda: not is_in_files(tmp_path, HERON), "the text outlives its deletion", DELETED_S)
        assert time.monotonic() - started < DELETED_S + 1
        ai.responses.delete(kept.id)
        assert lies_anywhere(live, shared), "blocks that a child needs went with the parent"
        assert ask(ai, "On.", previous_response_id=child.id).usage.input_tokens_details.cached_tokens > 0
        assert_at_rest(live)


@thread_only("it looks into the engine's store")
def test_a_conversation_deleted_while_a_turn_runs_takes_the_turn_along(tmp_path: Path, clients: Clients) -> None:
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        ai, store = clients(live), store_of(live)
        talk = ai.conversations.create()
        ask(ai, HERON, conversation=talk.id, store=False, text=LETTERS)
        said = {"input": HERON[::-1], "conversation": talk.id, "stream": True, "text": LETTERS}
        events = iter(ai.responses.create(**{**ASKED, "max_output_tokens": 150}, **said))
        response_id = next(events).response.id
        chain = store.find(talk.id.removeprefix("conv_"), "default").chain
        ai.conversations.delete(talk.id)
        with pytest.raises(APIError, match="deleted meanwhile"):
            list(events)
        with pytest.raises(NotFoundError):
            ai.responses.retrieve(response_id)
        until(lambda: not lies_anywhere(live, chain), "blocks outlive their conversation", DELETED_S)
        assert not is_in_files(tmp_path, HERON) and not is_in_files(tmp_path, HERON[::-1])
        assert_at_rest(live)


def test_a_running_turn_is_kept_while_the_server_drains(tmp_path: Path, clients: Clients) -> None:
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        more = {"input": "x", "stream": True, "extra_body": {"ignore_eos": True}}
        events = iter(clients(live).responses.create(**{**ASKED, "max_output_tokens": 400}, **more))
        first = next(events)
        stopping = threading.Thread(target=live.stop)
        stopping.start()
        until(lambda: live.services.engine.state != "ready", "it does not drain")
        last = list(events)[-1]
        stopping.join()
    assert last.type == "response.incomplete" and last.response.id == first.response.id
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        assert clients(live).responses.retrieve(last.response.id) == last.response


@thread_only("it breaks the engine's tier")
def test_a_disk_that_takes_nothing_fails_the_turn_and_not_the_server(
    tmp_path: Path, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client hears that its turn was not kept, before it could think that it was."""
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        ai, disk = clients(live), store_of(live).plane.places["disk"].tier
        kept = ask(ai, "before")

        def fail(items: object) -> None:
            raise TierError("The disk is broken.")

        monkeypatch.setattr(disk, "write", fail)
        with pytest.raises(APIStatusError) as caught:
            ask(ai, "x")
        assert (caught.value.status_code, caught.value.code) == (507, "state_refused")
        assert "receipt" not in str(caught.value.response.json())
        with pytest.raises(APIError) as failed:
            list(ask(ai, "x", stream=True))
        assert "not kept" in str(failed.value)
        assert ask(ai, "x", store=False).status == "incomplete"
        assert ai.responses.retrieve(kept.id) == kept
        monkeypatch.undo()
        assert_at_rest(live)


@thread_only("it looks into the engine's store")
@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        ([{"role": "user", "content": "x"}], {}),
        ([{"type": "message"}], {}),
        ([], {"marks": ["x"]}),
        ([], {"asked": []}),
        ([], {"metadata": {"a": 1}}),
    ],
)
def test_what_was_imported_and_is_no_turn_is_not_there(
    server: Callable[..., LiveServer], messages: list[Any], facts: dict[str, Any]
) -> None:
    """An operator's bundle may hold anything; a tenant's call on it is a 404, not a failure of the server."""
    live = server(num_blocks=256)
    call = live.services.engine.call_state("put", obj=Session(messages, (), {"object": "conversation", **facts}))
    assert live.server._loop is not None
    state_id = asyncio.run_coroutine_threadsafe(call, live.server._loop).result(10)
    path = f"/v1/conversations/conv_{state_id}"
    body = {"conversation": f"conv_{state_id}", "input": "x"}
    for answer in (live.get(path), live.get(f"{path}/items"), live.ask("DELETE", f"{path}/items/x"),
                   live.ask("POST", "/v1/responses", body)):  # fmt: skip
        assert answer.status == 404, answer.body


def test_without_a_folder_turns_end_with_the_process(clients: Clients) -> None:
    with running(num_blocks=256) as live:
        kept = ask(clients(live), "x")
        assert clients(live).responses.retrieve(kept.id) == kept
    with running(num_blocks=256) as live, pytest.raises(NotFoundError):
        clients(live).responses.retrieve(kept.id)
