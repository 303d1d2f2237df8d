"""A deletion over HTTP: acknowledged when it is done, said not to be when it is not, possible where text is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.errors import TierError, TierFullError
from tests.serve.servers import LiveServer, running, thread_only

TEXT = "seven grey wolves crossed the frozen lake"


def bytes_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def keep(live: LiveServer) -> tuple[str, str]:
    """A response and a conversation with a name; their paths."""
    items = [{"role": "user", "content": TEXT}]
    talk = live.ask("POST", "/v1/conversations", {"name": "wolves", "items": items})
    turn = live.ask("POST", "/v1/responses", {"input": TEXT, "max_output_tokens": 2})
    assert (talk.status, turn.status) == (200, 200), (talk.body, turn.body)
    return f"/v1/responses/{turn.json['id']}", f"/v1/conversations/{talk.json['id']}"


def test_damaged_turns_are_said_to_be_there_and_can_be_deleted(tmp_path: Path) -> None:
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        paths = keep(live)
    for file in (tmp_path / "texts").iterdir():
        file.write_bytes(file.read_bytes()[:-3] + b"\xff\0\xff")
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        for path in paths:
            answer = live.get(path)
            assert answer.status == 404 and b"lost or cannot be read" in answer.body
        named = live.get("/v1/conversations?name=wolves")
        assert named.status == 404 and paths[1].rpartition("/")[2].encode() in named.body
        assert live.ask("POST", "/v1/conversations", {"name": "wolves"}).status == 409
        for path in paths:
            assert live.ask("DELETE", path).status == 200
            answer = live.get(path)
            assert answer.status == 404 and b"was deleted" in answer.body
        assert TEXT[:20].encode() not in bytes_of(tmp_path)
        assert live.ask("POST", "/v1/conversations", {"name": "wolves"}).status == 200


@thread_only("it breaks the engine's tier")
@pytest.mark.parametrize(
    ("kind", "status", "code"), [(TierError, 503, "tier_failed"), (TierFullError, 507, "tier_full")]
)
def test_what_a_tier_did_not_remove_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TierError], status: int, code: str
) -> None:
    with running(state_dir=str(tmp_path), num_blocks=256) as live:
        assert live.ask("POST", "/state/knowledge", {"name": "lake", "text": TEXT}).status == 200
        paths = [*keep(live), "/state/knowledge/lake"]

        def fail(keys: object, *, scrub: bool = False) -> None:
            raise kind("The disk is broken.")

        assert live.engine is not None
        disk = live.engine.parts.state.store.plane.places["disk"].tier
        item = live.get(f"{paths[1]}/items").json["data"][0]["id"]
        monkeypatch.setattr(disk, "drop", fail)
        answer = live.ask("DELETE", f"{paths[1]}/items/{item}")
        assert (answer.status, answer.code) == (status, code), answer.body
        assert b"DELETE of the conversation tries it now" in answer.body
        assert live.get(f"{paths[1]}/items").json["data"] == []
        for path in paths:
            answer = live.ask("DELETE", path)
            assert (answer.status, answer.code) == (status, code), answer.body
            assert live.get(path).status == 404  # nobody finds it, and yet it is not said to be gone
            again = live.ask("DELETE", path)
            assert (again.status, again.code) == (status, code), again.body
        monkeypatch.undo()
        for path in paths:
            assert live.ask("DELETE", path).status in (200, 404)  # 404: the server's own new try was first
            assert live.ask("DELETE", path).status == 404
        assert TEXT[:20].encode() not in bytes_of(tmp_path)
