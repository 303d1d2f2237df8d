"""/state over HTTP: every call through a real engine, in a thread and in a child process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.serve.state_api import BINARY, MAX_PAGE, ROUTES
from tests.serve.servers import Answer, LiveServer, assert_at_rest, running

DOCS = Path(__file__).resolve().parents[2] / "docs"
Factory = Callable[..., LiveServer]
TOKENS = [(7 * i + i * i) % 250 for i in range(64)]
OBJECTS = "/state/objects"
ADMIN = {"Authorization": "Bearer admin-key"}


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a state folder, an admin and a user; asked as the admin."""
    folder = tmp_path_factory.mktemp("state")
    keys = {"api_key": ("alice:user-key",), "admin_key": "admin-key"}
    with running(engine_process=request.param, state_dir=str(folder), block_size=8, **keys) as started:
        started.headers = dict(ADMIN)
        yield started


def post(live: LiveServer, path: str, **body: Any) -> Answer:
    return live.ask("POST", path, body)


def put(live: LiveServer, **body: Any) -> str:
    answer = post(live, OBJECTS, **body)
    assert answer.status == 200, answer.body
    assert answer.json["ok"] and answer.json["action"] == "put"
    return answer.json["state_id"]


def refused(answer: Answer, status: int, code: str) -> dict[str, Any]:
    assert (answer.status, answer.json["error"]["code"]) == (status, code), answer.body
    return answer.json


def test_what_is_put_is_given_back(live: LiveServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for content in (
        {"text": "The library opens at 8."},
        {"token_ids": TOKENS},
        {"messages": messages, "token_ids": [1, 2]},
        {"text": "A document", "token_ids": TOKENS},
    ):
        state_id = put(live, **content)
        shown = live.get(f"{OBJECTS}/{state_id}").json
        assert shown["content"] == content and shown["state_id"] == state_id
        assert (
            shown["namespace"] == "default" and shown["num_blocks"] == len(shown["content"].get("token_ids", ())) // 8
        )
        dropped = live.ask("DELETE", f"{OBJECTS}/{state_id}")
        assert dropped.status == 200 and dropped.json["action"] == "drop"
        refused(live.get(f"{OBJECTS}/{state_id}"), 404, "state_not_found")


def test_one_object_through_every_call(live: LiveServer) -> None:
    state_id = put(live, text="A", metadata={"name": "doc", "version": "1", "ttl": 3600})
    path = f"{OBJECTS}/doc@1"
    assert post(live, f"{path}/pin", device="host", ttl=60).json["reason"].endswith("for 60 s")
    assert post(live, f"{path}/unpin").json["ok"]
    again = post(live, f"{path}/unpin")
    assert (again.status, again.json["ok"], again.json["reason"]) == (200, False, "it was not pinned")
    assert post(live, f"{path}/migrate", tier="disk").json["ok"]
    forked = post(live, f"{path}/fork", metadata={"name": "copy"}).json["state_id"]
    assert live.get(f"{OBJECTS}/copy").json["forked_from"] == state_id
    story = live.get(f"{OBJECTS}/{state_id}/explain").json
    actions = [receipt["action"] for receipt in story["receipts"]]
    assert actions[0] == "put" and {"pin", "unpin", "migrate"} <= set(actions)
    assert story["facts"]["payload_in"] == ["disk"]
    assert post(live, "/state/verify").json["reason"].endswith("sound, 0 not")
    for one in (state_id, forked):
        assert live.ask("DELETE", f"{OBJECTS}/{one}").status == 200


def test_an_update_is_the_next_generation_and_one_writer_wins(live: LiveServer) -> None:
    state_id = put(live, messages=[{"role": "user", "content": "1"}], metadata={"name": "talk"})
    path = f"{OBJECTS}/talk"
    messages = [{"role": "user", "content": "2"}]
    done = live.ask("PUT", path, {"messages": messages, "generation": 1})
    assert done.status == 200, done.body
    assert (done.status, done.json["ok"], done.json["action"], done.json["detail"]["generation"]) == (
        200, True, "update", 2,
    )  # fmt: skip
    late = refused(live.ask("PUT", path, {"messages": messages, "generation": 1}), 409, "state_conflict")
    assert late["error"]["param"] == "generation"
    assert live.ask("PUT", path, {"messages": messages, "token_ids": TOKENS}).json["detail"]["blocks"] == 8
    shown = live.get(f"{OBJECTS}/{state_id}").json
    assert (shown["generation"], shown["content"]) == (3, {"messages": messages, "token_ids": TOKENS})
    refused(live.ask("PUT", path, {}), 400, "invalid_request")
    refused(live.ask("PUT", path, {"text": "a", "generation": 0}), 400, "invalid_request")
    refused(live.ask("PUT", path, {"token_ids": TOKENS}), 400, "invalid_request")  # a session holds messages
    refused(live.ask("PUT", f"{OBJECTS}/nobody", {"text": "a"}), 404, "state_not_found")
    refused(live.ask("PUT", path, {"text": "a"}, {"Authorization": "Bearer user-key"}), 403, "access_denied")
    refused(live.ask("PUT", path, b"{}", {"Content-Type": "text/plain"}), 415, "unsupported_media_type")
    refused(live.ask("PUT", path, b" " * (8 * 2**20 + 1)), 413, "payload_too_large")
    live.ask("DELETE", path)


def test_a_bundle_leaves_and_comes_back_whole_or_not_at_all(live: LiveServer) -> None:
    state_id = put(live, text="B", metadata={"name": "bundle"})
    bundle = live.get(f"{OBJECTS}/{state_id}/export")
    assert (bundle.status, bundle.headers["content-type"]) == (200, BINARY)
    binary = {"Content-Type": BINARY}
    taken = live.ask("POST", "/state/import?name=twin", bundle.body, binary)
    assert taken.status == 200 and taken.json["detail"] == {"from": state_id}
    assert live.get(f"{OBJECTS}/twin").json["content"] == {"text": "B"}
    before = live.get(OBJECTS).json
    damaged = bytearray(bundle.body)
    damaged[len(damaged) // 2] ^= 1
    for bad in (bytes(damaged), bundle.body[:-1], b"x"):
        refused(live.ask("POST", "/state/import", bad, binary), 400, "state_bundle_invalid")
    refused(live.ask("POST", "/state/import", bundle.body), 415, "unsupported_media_type")
    assert live.get(OBJECTS).json == before
    for one in (state_id, taken.json["state_id"]):
        live.ask("DELETE", f"{OBJECTS}/{one}")


def test_the_list_has_pages_and_filters(live: LiveServer) -> None:
    ids = [put(live, text=str(i), metadata={"name": f"n{i}", "namespace": "pages"}) for i in range(5)]
    ids.append(put(live, messages=[{"role": "user", "content": "x"}], metadata={"namespace": "pages"}))
    seen, cursor = [], ""
    while cursor is not None:
        one = live.get(f"{OBJECTS}?namespace=pages&limit=2{cursor and '&after=' + cursor}").json
        assert len(one["objects"]) <= 2
        seen, cursor = seen + [obj["state_id"] for obj in one["objects"]], one["next"]
        live.ask("DELETE", f"{OBJECTS}/{seen[-1]}")  # a cursor outlives the object that it was made of
    assert seen == ids
    left = [obj["state_id"] for obj in live.get(f"{OBJECTS}?namespace=pages").json["objects"]]
    assert left == [ids[0], ids[2], ids[4]]
    for query, found in (("kind=session", []), ("name=n2", [ids[2]]), ("kind=knowledge&name=n4", [ids[4]])):
        assert [o["state_id"] for o in live.get(f"{OBJECTS}?namespace=pages&{query}").json["objects"]] == found
    for one in left:
        live.ask("DELETE", f"{OBJECTS}/{one}")


@pytest.mark.parametrize(
    "query", ["limit=0", f"limit={MAX_PAGE + 1}", "limit=x", "limit=²", "after=x", "colour=red", "kind=kv&kind=kv"]
)
def test_a_query_that_is_not_known_is_refused(live: LiveServer, query: str) -> None:
    found = refused(live.get(f"{OBJECTS}?{query}".replace("²", "%C2%B2")), 400, "invalid_request")
    assert found["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (OBJECTS, {}, 400, "invalid_request"),
        (OBJECTS, {"text": "a", "messages": [{}]}, 400, "invalid_request"),
        (OBJECTS, {"text": 1}, 400, "invalid_request"),
        (OBJECTS, {"text": "a", "colour": "red"}, 400, "unsupported_parameter"),
        (OBJECTS, {"text": "a", "metadata": {"kind": "dream"}}, 400, "invalid_request"),
        (OBJECTS, {"text": "a", "metadata": {"name": "a@b"}}, 400, "invalid_request"),
        (OBJECTS, {"token_ids": [-1]}, 400, "invalid_request"),
        (f"{OBJECTS}/nobody/pin", {}, 404, "state_not_found"),
        (f"{OBJECTS}/nobody/migrate", {}, 400, "invalid_request"),
        ("/state/evict", {"bytes": 0}, 400, "invalid_request"),
        ("/state/evict", {"policy": "magic"}, 400, "invalid_config"),
        ("/state/verify", {"tier": "dsik"}, 400, "invalid_request"),
        ("/state/nothing", {}, 404, "not_found"),
    ],
)
def test_what_cannot_be_done_is_said(live: LiveServer, path: str, body: Any, status: int, code: str) -> None:
    refused(live.ask("POST", path, body), status, code)


def test_a_refusal_has_its_receipt_beside_it(live: LiveServer) -> None:
    state_id = put(live, text="no tokens, no blocks")
    answer = refused(post(live, f"{OBJECTS}/{state_id}/pin"), 507, "state_refused")
    receipt = answer["receipt"]
    assert (receipt["action"], receipt["ok"], receipt["state_id"]) == ("pin", False, state_id)
    assert receipt["reason"] in answer["error"]["message"] and set(answer) == {"error", "receipt"}
    live.ask("DELETE", f"{OBJECTS}/{state_id}")


def test_tiers_tell_bytes_hits_and_failures_by_kind(live: LiveServer) -> None:
    state_id = put(live, text="counted")
    tiers = live.get("/state/tiers").json["tiers"]
    assert {"used_bytes", "by_kind", "hits", "misses", "failures"} <= set(tiers["disk"])
    assert tiers["disk"]["by_kind"]["knowledge"] > 0
    live.ask("DELETE", f"{OBJECTS}/{state_id}")


def test_a_user_is_kept_out_and_bodies_are_bounded(live: LiveServer) -> None:
    state_id = put(live, text="secret")
    user = {"Authorization": "Bearer user-key"}
    for method, path in (("GET", OBJECTS), ("GET", f"{OBJECTS}/{state_id}"), ("DELETE", f"{OBJECTS}/{state_id}")):
        refused(live.ask(method, path, headers=user), 403, "access_denied")
    refused(live.ask("POST", OBJECTS, {"text": "a"}, user), 403, "access_denied")
    refused(live.ask("POST", OBJECTS, b" " * (8 * 2**20 + 1)), 413, "payload_too_large")
    assert live.ask("DELETE", f"{OBJECTS}/{state_id}").status == 200
    assert_at_rest(live)


def test_an_engine_that_does_not_answer_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(verb: str, **arguments: Any) -> Any:
        await asyncio.Event().wait()

    with running(request_timeout=0.05) as live:
        monkeypatch.setattr(live.services.engine, "call_state", never)
        refused(live.get(OBJECTS), 504, "deadline_exceeded")
        refused(post(live, "/state/verify"), 504, "deadline_exceeded")
        assert_at_rest(live)


@pytest.mark.parametrize("page", ["state.md", "state.zh.md"])
def test_the_page_has_every_path(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for route in ROUTES:
        for method in (route.methods or set()) - {"HEAD"}:
            assert f"`{method} {route.path.replace('{state_id}', '{id}')}`" in text


def test_an_answer_is_plain_json(live: LiveServer) -> None:
    assert json.loads(live.get(OBJECTS).body).keys() == {"objects", "next"}
