"""Safetensors: sound files are read exactly, single or sharded; every other file is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nanovllm.errors import ModelFileError, NanoVLLMError, UnsupportedModelError
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.safetensors_loader import SafetensorsSource
from nanovllm.models.weights import RandomSource, check_weights


def test_single_file(tiny_directory: Path, tiny: ModelConfig) -> None:
    source, original = SafetensorsSource(tiny_directory), RandomSource(tiny)
    check_weights(source, tiny)
    for name in original.names():
        torch.testing.assert_close(source.get(name), original.get(name), rtol=0, atol=0)
    with pytest.raises(ModelFileError, match="absent"):
        source.get("absent")
    source.close()


def test_shards_and_dtypes(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(5).half()
    save_file({"a": a}, tmp_path / "one.safetensors")
    save_file({"b": b, "c": torch.randn(2).double()}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = SafetensorsSource(tmp_path)
    assert sorted(source.names()) == ["a", "b", "c"] and source.shape("a") == (3, 4)
    torch.testing.assert_close(source.get("a"), a)
    torch.testing.assert_close(source.get("b"), b)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelFileError, match="two"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x.bin",
        "",
        5,
        "\0.safetensors",
    ],
)
def test_shard_names_stay_in_the_directory(tmp_path: Path, name: Any) -> None:
    save_file({"a": torch.ones(1)}, tmp_path.parent / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelFileError, match="plain"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff"])
def test_bad_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(ModelFileError):
        SafetensorsSource(tmp_path)


def _write(directory: Path, table: Any, data: bytes = b"\0" * 64, length: int | None = None) -> None:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    prefix = struct.pack("<Q", len(header) if length is None else length)
    (directory / "model.safetensors").write_bytes(prefix + header + data)


def _tensor(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"a": _tensor([4], [0, 8])}, "bytes"),
        ({"a": _tensor([4], [0, 2**40])}, "outside"),
        ({"a": _tensor([4], [-16, 0])}, "outside"),
        ({"a": _tensor([4], [16, 0])}, "bytes"),
        ({"a": _tensor([-4], [0, 16])}, "shape"),
        ({"a": _tensor([2**40, 2**40], [0, 16])}, "shape"),
        ({"a": _tensor([1] * 9, [0, 4])}, "shape"),
        ({"a": _tensor([True], [0, 4])}, "shape"),
        ({"a": _tensor("4", [0, 16])}, "shape"),
        ({"a": _tensor([4], [0, 16, 32])}, "offsets"),
        ({"a": _tensor([4], [0, 16]), "b": _tensor([4], [8, 24])}, "overlap"),
        ({"a": 5}, "record"),
        (b'{"a": {}, "a": {}}', "twice"),
        (b"[]", "object"),
        (b"\xff\xfe{}", "JSON"),
        (b"{" + b'"a":{' * 50_000, "JSON"),
    ],
)
def test_bad_headers(tmp_path: Path, table: Any, match: str) -> None:
    _write(tmp_path, table)
    with pytest.raises(ModelFileError, match=match):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("length", [2**63, 10**9, 65])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    _write(tmp_path, b"", b"\0" * 64, length)
    with pytest.raises(ModelFileError, match="header claims"):
        SafetensorsSource(tmp_path)


def test_foreign_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    _write(tmp_path, {"a": _tensor([4], [0, 4], "F8_E4M3")})
    with pytest.raises(UnsupportedModelError, match="F8_E4M3"):
        SafetensorsSource(tmp_path)


def test_empty_and_tiny_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="neither"):
        SafetensorsSource(tmp_path)
    for size in (0, 7, 9):
        (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
        with pytest.raises(ModelFileError):
            SafetensorsSource(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutations(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(2).half()}, file, metadata={"format": "pt"})
    damaged = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=6) | st.sampled_from([b"9", b"-1", b"[", b'"', b"e9"]))
        damaged[at : at + data.draw(st.integers(0, 6))] = patch
    file.write_bytes(damaged)
    try:
        source = SafetensorsSource(tmp_path)
        for name in source.names():
            assert tuple(source.get(name).shape) == source.shape(name)
        source.fingerprint()
    except NanoVLLMError:
        return


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    def identity(value: float) -> str:
        save_file({"a": torch.full((1000, 10), value)}, tmp_path / "model.safetensors")
        return SafetensorsSource(tmp_path).fingerprint()

    assert identity(1.0) == identity(1.0) != identity(2.0)
