"""kill -9 as soon as a DELETE was acknowledged: after a restart it is a 404, and no byte of it is in the folder.

Its bytes are its text, its tokens as a label of KV holds them, and the KV itself. Killed before the acknowledgement
(named points, in the long tests) it is either gone like that, or there, whole, to be deleted again.
"""

from __future__ import annotations

import contextlib
import http.client
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.models.byte_tokenizer import ByteTokenizer
from nanovllm.state.envelope import pack_tokens
from tests.serve.servers import Client, ServerProcess, running, until

Process = Callable[..., ServerProcess]
LONG = (pytest.mark.long, pytest.mark.timeout(1800))
TEXTS = {
    "response": "the blue heron nests behind the old mill, and nobody has told the miller yet",
    "conversation": "seven grey wolves crossed the frozen lake at dawn while the village was asleep",
    "knowledge": "the vault of the town hall opens at noon, with the third of the copper keys only",
}
REMOVALS = ("ledger.commit", "texts.remove", "texts.sync_names", "kv.write")
POINTS = [*(f"{call}:{side}" for call in REMOVALS for side in "01"), "kv.write:half"]
SETTINGS = {"num_blocks": 256, "state_load": "always"}


def keep(server: Client, kind: str) -> str:
    """One of that kind, durable, its KV written behind; its path."""
    if kind == "knowledge":
        asked = ("/state/knowledge", {"name": "vault", "text": TEXTS[kind], "system": "S.", "wait": True})
        answer = server.ask("POST", *asked)
        assert answer.status == 200, answer.body
        return "/state/knowledge/vault"
    turn = {"model": "tiny:random", "input": TEXTS[kind], "max_output_tokens": 20, "temperature": 0}
    talk = server.ask("POST", "/v1/conversations", {}).json["id"] if kind == "conversation" else None
    turn |= {"conversation": talk, "store": False} if talk else {}
    answer = server.ask("POST", "/v1/responses", turn)
    assert answer.status == 200, answer.body
    return f"/v1/conversations/{talk}" if talk else f"/v1/responses/{answer.json['id']}"


def contents(folder: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def traces(folder: Path, kind: str) -> list[bytes]:
    """What must not be there any more: pieces of the text, of its tokens, and of the KV behind these."""
    text, ids = TEXTS[kind], ByteTokenizer().encode(TEXTS[kind])
    runs = [pack_tokens(ids[i : i + 8]) for i in range(len(ids) - 8)]
    until(lambda: bool(found(folder, runs)), "its KV is not written behind")
    whole = contents(folder)
    labels = [at for run in runs if (at := whole.find(run)) >= 0]
    kv = [whole[at + 1000 : at + 1064] for at in labels]
    assert all(any(piece) for piece in kv)
    pieces = [text[i : i + 12].encode() for i in range(len(text) - 12)]
    return [*pieces, *runs, *kv]


def found(folder: Path, pieces: list[bytes]) -> list[bytes]:
    whole = contents(folder)
    return [piece for piece in pieces if piece in whole]


@pytest.mark.parametrize("kind", ["knowledge", "conversation", pytest.param("response", marks=LONG)])
def test_killed_as_soon_as_a_deletion_is_acknowledged(tmp_path: Path, process: Process, kind: str) -> None:
    server = process("--state-dir", str(tmp_path), "--num-blocks", "256")
    paths = {each: keep(server, each) for each in TEXTS}
    pieces = {each: traces(tmp_path, each) for each in TEXTS}
    assert server.ask("DELETE", paths[kind]).status == 200
    server.signal(signal.SIGKILL)
    server.wait()
    assert not found(tmp_path, pieces[kind])
    with running(state_dir=str(tmp_path), **SETTINGS) as again:
        for each, path in paths.items():
            assert again.get(path).status == (404 if each == kind else 200)
            assert bool(found(tmp_path, pieces[each])) == (each != kind)
        assert again.ask("DELETE", paths[kind]).status == 404


def test_killed_as_soon_as_an_items_deletion_is_acknowledged(tmp_path: Path, process: Process) -> None:
    server = process("--state-dir", str(tmp_path), "--num-blocks", "256")
    path = keep(server, "conversation")
    pieces = traces(tmp_path, "conversation")
    items = server.get(f"{path}/items?order=asc").json["data"]
    assert server.ask("DELETE", f"{path}/items/{items[0]['id']}").status == 200
    server.signal(signal.SIGKILL)
    server.wait()
    assert not found(tmp_path, pieces)
    with running(state_dir=str(tmp_path), **SETTINGS) as again:
        assert [each["id"] for each in again.get(f"{path}/items?order=asc").json["data"]] == [items[1]["id"]]


@pytest.mark.parametrize("point", [pytest.param(point, marks=LONG) for point in POINTS])
def test_killed_within_a_deletion_it_is_gone_or_there_to_be_deleted(
    tmp_path: Path, process: Process, point: str
) -> None:
    for kind in TEXTS:
        folder, armed = tmp_path / kind, tmp_path / f"{kind}.armed"
        env = {"KILL_POINT": point, "KILL_HITS": "1", "KILL_ARMED": str(armed)}
        server = process("--state-dir", str(folder), "--num-blocks", "256", module="tests.serve.kill_child", **env)
        path, pieces = keep(server, kind), traces(folder, kind)
        armed.touch()
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            raise AssertionError(f"{point} was not reached: {server.ask('DELETE', path).status}")
        assert server.wait() == -signal.SIGKILL
        with running(state_dir=str(folder), **SETTINGS) as again:
            status = again.get(path).status
            assert status in (200, 404)
            if status == 200:
                assert again.ask("DELETE", path).status == 200 and again.get(path).status == 404
            assert not found(folder, pieces), (kind, point, status)
