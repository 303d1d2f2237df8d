"""`nanovllm state`: every verb on a folder, the same on a server, and who is asked when both are there."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.state import state
from nanovllm.cli.state_place import _PATHS
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.ownership import address_of, is_owned, note_address
from tests.serve.servers import LiveServer, running

Run = Callable[..., subprocess.CompletedProcess[str]]
Ask = Callable[..., Any]
KEY = {"NANOVLLM_API_KEY": "admin-key"}


@pytest.fixture
def ask(nanovllm: Run, tmp_path: Path) -> Ask:
    """`nanovllm state ARGUMENTS --json` on a folder of the test's own; what it says."""

    def run(*arguments: str, code: int = 0, **more: Any) -> Any:
        done = nanovllm("state", *arguments, "--json", NANOVLLM_STATE_DIR=str(tmp_path / "state"), **more)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if done.stdout else done.stderr

    return run


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Path]]:
    """A server that has a state folder, and the folder."""
    folder = tmp_path_factory.mktemp("owned")
    with running(state_dir=str(folder), admin_key="admin-key") as live:
        yield live, folder


def through_every_verb(ask: Ask, tmp_path: Path) -> None:
    """The verbs that a folder and a server have in common."""
    first = ask("put", "The library opens at 8.", "--name", "library", "--version", "1", "--durable")
    assert first["ok"] and first["reason"] == "durable"
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "hi"}]')
    assert ask("put", "--messages", str(tmp_path / "m.json"), "--name", "talk")["ok"]
    assert [obj["name"] for obj in ask("ls")["objects"]] == ["library", "talk"]
    page = ask("ls", "--limit", "1")
    assert [obj["name"] for obj in ask("ls", "--after", page["next"])["objects"]] == ["talk"]
    assert [obj["kind"] for obj in ask("ls", "--kind", "session")["objects"]] == ["session"]
    assert ask("show", "library@1")["content"] == {"text": "The library opens at 8."}
    assert ask("show", first["state_id"])["name"] == "library"
    assert ask("fork", "talk", "--name", "other")["ok"]
    assert ask("show", "other")["content"]["messages"] == [{"role": "user", "content": "hi"}]
    assert ask("migrate", "library", "disk")["ok"]
    assert ask("explain", "library")["facts"]["payload_in"][-1] == "disk"
    bundle = str(tmp_path / "b.bundle")
    assert ask("export", "library", "--out", bundle)["bytes"] == Path(bundle).stat().st_size
    assert "cannot be written" in ask("export", "library", "--out", bundle, code=2)
    assert ask("import", bundle, "--name", "twin")["action"] == "import"
    assert ask("show", "twin")["content"] == {"text": "The library opens at 8."}
    assert ask("verify")["reason"].endswith(" sound, 0 not")
    assert "There is no tier 'dsik' to verify" in ask("verify", "--tier", "dsik", code=2)
    assert ask("top")["objects"] == 4 and ask("top")["tiers"]["disk"]["by_kind"]["knowledge"] > 0
    assert "Refused: " in ask("evict", "--kind", "session", "--tier", "disk", code=1)  # the last copies of texts
    for name in ("library", "talk", "other", "twin"):
        assert ask("drop", name)["action"] == "drop"
    assert "There is no state 'library'" in ask("show", "library", code=1)
    assert ask("ls") == {"objects": [], "next": None}


def test_every_verb_on_a_folder(ask: Ask, tmp_path: Path) -> None:
    through_every_verb(ask, tmp_path)
    assert "A pin is held by a running server" in ask("pin", "library", code=2)


def test_no_story_of_a_folder_says_why(nanovllm: Run, tmp_path: Path) -> None:
    where = ("--state-dir", str(tmp_path / "s"))
    nanovllm("state", "put", "text", "--name", "t", *where)
    assert "a folder without a server keeps none" in nanovllm("state", "explain", "t", *where).stdout


def test_every_verb_on_the_server_that_has_the_folder(
    nanovllm: Run, owner: tuple[LiveServer, Path], tmp_path: Path
) -> None:
    """Only the folder is named: its owner's address is beside the lock."""

    def ask(*arguments: str, code: int = 0) -> Any:
        done = nanovllm("state", *arguments, "--json", "--state-dir", str(owner[1]), **KEY)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if done.stdout else done.stderr

    through_every_verb(ask, tmp_path)
    ask("put", "A", "--name", "a")
    assert ask("pin", "a", "--device", "host", "--ttl", "60")["reason"].endswith("for 60 s")
    assert ask("unpin", "a")["ok"] and not ask("unpin", "a", code=1)["ok"]
    assert "Refused: it has no full block" in ask("pin", "a", code=1)
    assert [receipt["action"] for receipt in ask("explain", "a")["receipts"]].count("pin") == 2
    assert ask("drop", "a")["ok"]


def test_a_server_by_its_address_and_what_it_refuses(nanovllm: Run, owner: tuple[LiveServer, Path]) -> None:
    url = owner[0].server.url
    listed = json.loads(nanovllm("state", "ls", "--json", "--url", url, **KEY).stdout)
    assert {row["kind"] for row in listed["objects"]} <= {"meta"} and listed["next"] is None  # its own bookkeeping
    done = nanovllm("state", "ls", "--url", url, "--api-key", "another")
    assert (done.returncode, done.stdout) == (1, "") and "API key is missing or unknown" in done.stderr
    done = nanovllm("state", "show", "nobody", "--url", url, **KEY)
    assert done.returncode == 1 and "There is no state 'nobody'" in done.stderr


def test_a_document_is_uploaded_and_asked_about(nanovllm: Run, owner: tuple[LiveServer, Path], tmp_path: Path) -> None:
    url, folder = owner[0].server.url, str(tmp_path / "s")
    about = ("--name", "library", "--version", "1", "--system", "Answer from it.")
    text = "The library opens at 8. " * 4
    kept = json.loads(nanovllm("state", "put", text, *about, "--wait", "--url", url, "--json", **KEY).stdout)
    assert (kept["prefill"]["status"], kept["durable"], kept["scope"]) == ("computed", True, "own")
    ask = ("--max-tokens", "2", "--knowledge", "library")
    done = nanovllm("chat", "--url", url, *ask, stdin="When?\n/timeline\n", **KEY)
    assert done.returncode == 0 and int(re.search(r"(\d+) cached;", done.stderr)[1]) >= kept["tokens"] - 32
    done = nanovllm("chat", "--url", url, "--knowledge", "nobody", stdin="When?\n", **KEY)
    assert done.returncode != 0 and "There is no document 'nobody'" in done.stderr
    done = nanovllm("state", "put", text, "--name", "p", "--public", "--url", url, **KEY)
    assert done.returncode == 0 and "p is kept on the disk" in done.stdout and "KV left: each key" in done.stdout
    for flags in (("--wait",), ("--name", "x", "--wait", "--durable"), ("--name", "x", "--kind", "kv", "--system", "")):
        assert nanovllm("state", "put", "x", *flags, "--url", url, **KEY).returncode == 2
    done = nanovllm("state", "put", text, *about, "--state-dir", folder)
    assert done.returncode == 0 and "KV left: no engine has this folder" in done.stdout
    assert "library@1 is kept on the disk: " in done.stdout and "not tokenized yet" in done.stdout
    [stored] = json.loads(nanovllm("state", "ls", "--state-dir", folder, "--json").stdout)["objects"]
    told = json.loads(nanovllm("state", "put", text, *about, "--state-dir", folder, "--json").stdout)
    assert (told["durable"], told["tokens"]) == (stored["durable"], stored["num_tokens"]) == (True, 0)
    for given, mend in (
        ((text, *about, "--wait"), "Leave --wait out"),
        ((text, *about, "--template", "no slot"), "must have {document} once"),
        ((text, *about, "--template", ""), "must have {document} once"),
        (("", *about), "a text with a --name"),
    ):
        done = nanovllm("state", "put", *given, "--state-dir", folder)
        assert done.returncode == 2 and mend in done.stderr, done.stderr
    assert "system: 'Answer from it.'" in nanovllm("state", "show", "library", "--state-dir", folder).stdout
    offline = ("chat", "tiny:random", "--dtype", "float32", "--state-dir", folder, *ask)
    done = nanovllm(*offline, stdin="When?\n/timeline\n")
    assert done.returncode == 0 and done.stdout, done.stderr
    for name in ("library", "p"):
        query = "?scope=public" if name == "p" else ""
        assert owner[0].ask("DELETE", f"/state/knowledge/{name}{query}").status == 200


def test_an_owner_without_an_address_is_named(nanovllm: Run, tmp_path: Path) -> None:
    """Its folder may be looked at; changing it is refused, with the process's number."""
    with StateStore.open(tmp_path / "s") as store:
        store.put("text", {"name": "t"})
        assert is_owned(tmp_path / "s") and address_of(tmp_path / "s") is None
        seen = nanovllm("state", "ls", "--state-dir", str(tmp_path / "s"))
        assert seen.returncode == 0 and " t " in seen.stdout
        done = nanovllm("state", "drop", "t", "--state-dir", str(tmp_path / "s"))
        assert done.returncode == 1 and "is in use by process" in done.stderr
        note_address(tmp_path / "s", "http://127.0.0.1:9")
    assert not is_owned(tmp_path / "s")
    assert nanovllm("state", "drop", "t", "--state-dir", str(tmp_path / "s")).returncode == 0  # a note is no owner
    assert address_of(tmp_path / "s") is None  # the new owner took the old one's note away


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("ls",), 2, "--state-dir DIR or --url URL"),
        (("ls", "--state-dir", "nowhere"), 1, "nowhere is no state folder"),
        (("drop", "x", "--state-dir", "nowhere"), 1, "nowhere is no state folder"),
        (("put", "--state-dir", "s"), 2, "Give text, messages or token_ids"),
        (("put", "--messages", "nowhere", "--state-dir", "s"), 2, "nowhere cannot be read"),
        (("import", "nowhere", "--state-dir", "s"), 2, "nowhere cannot be read"),
        (("evict", "--bytes", "many", "--state-dir", "s"), 2, "bytes"),
        (("ls", "--url", "127.0.0.1"), 2, "url must begin with http://"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    nanovllm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = nanovllm("state", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1) and says in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_damage_is_found_and_set_aside(ask: Ask, tmp_path: Path) -> None:
    ask("put", "text", "--name", "t")
    (file,) = (tmp_path / "state" / "texts").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = ask("verify", code=1)
    assert not found["ok"] and file.exists()
    ask("verify", "--repair", code=1)
    assert not file.exists() and list((tmp_path / "state" / "quarantine").iterdir())


def test_tables_for_people_are_harmless(nanovllm: Run, tmp_path: Path) -> None:
    where = ("--state-dir", str(tmp_path / "s"))
    nanovllm("state", "put", "red \x1b[31mtext", "--name", "a [bold]name[/]", *where)
    for verb in (("ls",), ("show", "a [bold]name[/]"), ("explain", "a [bold]name[/]"), ("top",), ("verify",)):
        done = nanovllm("state", *verb, *where)
        assert done.returncode == 0 and done.stdout and "\x1b" not in done.stdout, done.stderr
    assert "a [bold]name[/]" in nanovllm("state", "ls", *where, COLUMNS="160").stdout


@pytest.mark.parametrize("page", ["state.md", "state.zh.md"])
def test_every_verb_has_a_path_and_is_on_the_page(page: str) -> None:
    verbs = {command.name for command in state.registered_commands}
    assert verbs | {"upload"} == set(_PATHS)  # `put` uploads what it is told of as a document
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text(encoding="utf-8")
    (listed,) = re.findall(r"`nanovllm state ([a-z|]+)`", text)
    assert set(listed.split("|")) == verbs
