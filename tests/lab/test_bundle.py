"""Bundles and manifests of any experiment: sealed, marked, and every changed byte found."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.errors import BundleError
from nanovllm.lab.bundle import PROSE as FREE
from nanovllm.lab.bundle import Bundle
from nanovllm.lab.environment import code_facts, environment
from nanovllm.lab.manifest import check_files, read_manifest, seal, write_manifest
from nanovllm.lab.rule_wording import RULES
from nanovllm.lab.wording import PROSE, say


def places(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def made(folder: Path) -> Path:
    bundle = Bundle(folder, {"experiment": 0})
    bundle.write("README.md", "read me\n")
    bundle.write("raw/a.jsonl", '{"x": 1}\n')
    bundle.write_json("tables.json", {"解释": [1.5, None]})
    bundle.write("notes.md", "notes\n")
    bundle.finish()
    return folder


def test_a_sealed_bundle_is_as_it_was_sealed(tmp_path: Path) -> None:
    folder = made(tmp_path / "b")
    manifest = read_manifest(folder)
    assert manifest["status"] == "ok" and not list(check_files(folder, manifest, FREE))
    (folder / "notes.md").write_text("mine\n")
    assert not list(check_files(folder, manifest, FREE))
    assert [finding.where for finding in check_files(folder, manifest, ())] == ["notes.md"]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = made(tmp_path_factory.mktemp("b") / "b")
    name = data.draw(st.sampled_from(["README.md", "raw/a.jsonl", "tables.json", "manifest.json"]))
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    try:
        assert list(check_files(folder, read_manifest(folder), FREE)) or _is_white_space(folder, name, content)
    except BundleError:
        assert name == "manifest.json"


def _is_white_space(folder: Path, name: str, content: bytearray) -> bool:
    """The manifest's own layout is not sealed: its text may be printed anew."""
    again = folder / "again"
    again.mkdir()
    return name == "manifest.json" and read_manifest(folder) == read_manifest(made(again / "b"))


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="not empty"):
        Bundle(tmp_path, {})
    with pytest.raises(BundleError, match="not empty"):
        Bundle(tmp_path / "thesis.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    Bundle(tmp_path / "empty", {})


def test_what_fails_is_marked_and_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Bundle(tmp_path / "b", {}) as bundle:
        assert read_manifest(tmp_path / "b")["status"] == "running"
        bundle.write("raw/a.jsonl", "{}\n")
        bundle.write("README.md", str(1 / 0))
    manifest = read_manifest(tmp_path / "b")
    assert manifest["status"] == "failed" and manifest["error"] == "ZeroDivisionError: division by zero"
    assert set(manifest["files"]) == {"raw/a.jsonl", "notes.md"}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": 1}', "\udcff", "9" * 5000, "{" * 10_000])
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError):
        read_manifest(tmp_path)


def test_a_folder_of_too_many_files_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "b")
    monkeypatch.setattr("nanovllm.lab.manifest.MAX_FILES", 3)
    with pytest.raises(BundleError, match="more than 3 files"):
        write_manifest(folder, seal(folder, {}))


def test_the_environment_names_no_path_and_no_person() -> None:
    told = str(environment()) + str(code_facts())
    assert str(Path.home()) not in told and str(Path.cwd()) not in told
    assert "load_average_before" in environment()


def test_both_languages_say_the_same_with_the_same_places() -> None:
    for key, (english, chinese) in PROSE.items():
        assert places(english) == places(chinese), key
        assert english and chinese
    assert set(RULES) < set(PROSE) and say("zh", "item") == "项"
