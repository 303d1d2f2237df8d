"""GGUF: dequantised values equal gguf's, names and row order equal the checkpoint's, damage is refused."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import write_gguf

from nanovllm.errors import ModelFileError, NanoVLLMError, UnsupportedModelError
from nanovllm.models.gguf_loader import GGUFSource, hf_name
from nanovllm.models.loading import load_model_files, tiny_config
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weights import RandomSource, check_weights

BLOCK_TYPES = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]
K_TYPES = [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K]


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda k: k.name)
def test_block_types_dequantise_as_gguf_does(gguf_of: Callable[..., Path], kind: Q) -> None:
    values = np.random.default_rng(0).standard_normal((6, 64), np.float32)
    packed = gguf.quants.quantize(values, kind)
    source = GGUFSource(gguf_of({"blk.0.ffn_up.weight": (packed, kind)}))
    got = source.get("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_array_equal(got.numpy(), gguf.dequantize(packed, kind))
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - values).max() < 0.5  # the right values, not merely the same ones


@pytest.mark.parametrize("kind", K_TYPES, ids=lambda k: k.name)
def test_k_types_dequantise_as_gguf_does(gguf_of: Callable[..., Path], kind: Q) -> None:
    width = gguf.GGML_QUANT_SIZES[kind][1]
    packed = np.random.default_rng(1).integers(0, 60, (4, 2 * width), np.uint8)
    source = GGUFSource(gguf_of({"token_embd.weight": (packed, kind)}))
    got = source.get("model.embed_tokens.weight")
    assert got.shape == source.shape("model.embed_tokens.weight") == (4, 512)
    np.testing.assert_array_equal(got.numpy(), gguf.dequantize(packed, kind))


def test_plain_types_keep_their_dtype(gguf_of: Callable[..., Path]) -> None:
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    half = torch.from_numpy(values).to(torch.bfloat16)
    brain = half.view(torch.uint16).numpy().view(np.uint8)
    path = gguf_of(
        {
            "token_embd.weight": (values, None),
            "output.weight": (values.astype(np.float16), None),
            "output_norm.weight": (brain, Q.BF16),
        }
    )
    source = GGUFSource(path)
    torch.testing.assert_close(source.get("model.embed_tokens.weight"), torch.from_numpy(values))
    torch.testing.assert_close(source.get("lm_head.weight"), torch.from_numpy(values).half())
    torch.testing.assert_close(source.get("model.norm.weight"), half)
    with pytest.raises(ModelFileError, match=r"model\.layers\.9"):
        source.get("model.layers.9.mlp.up_proj.weight")


def test_other_types_are_refused_by_name(gguf_of: Callable[..., Path]) -> None:
    packed = np.zeros((2, 17 * 2), np.uint8)
    with pytest.raises(UnsupportedModelError, match="MXFP4"):
        GGUFSource(gguf_of({"token_embd.weight": (packed, Q.MXFP4)}))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_converted_model_comes_back_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    config = tiny_config(architecture)
    write_gguf(tmp_path / "m.gguf", config)
    original, loaded = RandomSource(config), load_model_files(str(tmp_path / "m.gguf"))
    assert set(loaded.weights.names()) == set(original.names())
    for name in original.names():
        torch.testing.assert_close(loaded.weights.get(name), original.get(name), rtol=0, atol=0)
    same = (
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "attention_bias",
        "qk_norm",
        "vocab_size",
        "eos_token_ids",
    )
    assert all(getattr(loaded.config, name) == getattr(config, name) for name in same)
    loaded.weights.close()


def test_names() -> None:
    assert hf_name("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"
    assert hf_name("output.weight") == "lm_head.weight"
    assert hf_name("blk.0.ffn_gate_inp.weight") == "blk.0.ffn_gate_inp.weight"


def test_unknown_tensors_are_refused_by_name(tmp_path: Path, tiny: ModelConfig) -> None:
    class Extra(RandomSource):
        def names(self) -> list[str]:
            return [*super().names(), "blk.0.ffn_gate_inp.weight"]

    with pytest.raises(UnsupportedModelError, match="ffn_gate_inp"):
        check_weights(Extra(tiny), tiny)


def test_fingerprints_tell_files_apart(tiny_gguf: Path, tmp_path: Path, tiny: ModelConfig) -> None:
    first = GGUFSource(tiny_gguf).fingerprint()
    assert first == GGUFSource(tiny_gguf).fingerprint() and len(first) == 64
    changed = bytearray(tiny_gguf.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "changed.gguf").write_bytes(changed)
    assert GGUFSource(tmp_path / "changed.gguf").fingerprint() != first


def test_names_and_row_order_equal_transformers(tiny_gguf: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    loaded = load_model_files(str(tiny_gguf))
    config = AutoConfig.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(str(tiny_gguf), return_tensors=True, model_to_load=skeleton)["tensors"]
    assert set(loaded.weights.names()) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(loaded.weights.get(name), tensor.float(), rtol=0, atol=0)
    same = ("hidden_size", "head_dim", "rms_norm_eps", "max_position_embeddings")
    assert all(getattr(loaded.config, name) == getattr(config, name) for name in same)


def test_the_real_model_equals_gguf(smollm2_path: Path) -> None:
    loaded, reader = load_model_files(str(smollm2_path)), gguf.GGUFReader(smollm2_path)
    theirs = {hf_name(t.name): gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors if "blk.1" in t.name}
    for name, values in theirs.items():
        got = loaded.weights.get(name).numpy()
        if "q_proj" in name or "k_proj" in name:  # rows are re-ordered within heads, proven above
            got, values = np.sort(got, axis=0), np.sort(values, axis=0)
        np.testing.assert_array_equal(got, values)
    assert len(theirs) == 99
    assert loaded.config.parameter_count() == pytest.approx(134.5e6, rel=0.01)
    loaded.weights.close()


# --- damaged files ---


def _open(path: Path) -> None:
    """What loading does, every tensor included; only our errors may escape."""
    try:
        loaded = load_model_files(str(path))
        for name in loaded.weights.names():
            loaded.weights.get(name)
        loaded.weights.fingerprint()
        loaded.weights.close()
    except NanoVLLMError as error:
        assert error.message and len(str(error)) < 1000


def _refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=match):
        GGUFSource(path)


def test_absurd_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    start = b"GGUF" + struct.pack("<I", 3)
    _refused(path, b"", "cannot be read")
    _refused(path, b"GG", "too early")
    _refused(path, b"nope" * 8, "GGUF")
    _refused(path, start + struct.pack("<QQ", 2**63, 0), "tensors")
    _refused(path, start + struct.pack("<QQ", 0, 2**62), "keys")
    _refused(path, start + struct.pack("<QQQ", 0, 1, 2**60) + b"k" * 32, "too early")
    key = struct.pack("<Q", 1) + b"k"
    one = start + struct.pack("<QQ", 0, 1) + key
    _refused(path, one + struct.pack("<IIQ", 9, 8, 2**50) + b"\0" * 64, "array items")
    _refused(path, one + struct.pack("<I", 77) + b"\0" * 64, "value type 77")
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(2000))
    _refused(path, one + struct.pack("<I", 9) + nested, "nested")
    _refused(path, one + struct.pack("<IQ", 8, 2) + b"\xff\xff", "UTF-8")
    with pytest.raises(UnsupportedModelError, match="version 9"):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
        GGUFSource(path)
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
        GGUFSource(path)


def _tensor_file(*records: tuple[str, tuple[int, ...], int, int], data: int = 256) -> bytes:
    table = b"".join(
        struct.pack("<Q", len(n)) + n.encode() + struct.pack(f"<I{len(d)}QIQ", len(d), *d, kind, offset)
        for n, d, kind, offset in records
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(records), 0) + table
    return head + b"\0" * (-len(head) % 32 + data)


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([("a", (2**40, 2**40), 0, 0)], "dimensions"),
        ([("a", (0,), 0, 0)], "dimensions"),
        ([("a", (1, 1, 1, 1, 1), 0, 0)], "dimensions"),
        ([("a", (8,), 0, 2**62)], "outside"),
        ([("a", (8,), 0, 7)], "unaligned"),
        ([("a", (65,), 0, 0)], "outside"),
        ([("a", (16,), 2, 0)], "whole Q4_0 blocks"),
        ([("a", (8,), 0, 0), ("a", (8,), 0, 32)], "twice"),
        ([("a", (16,), 0, 0), ("b", (8,), 0, 32)], "overlaps"),
    ],
)
def test_absurd_tensor_records(
    tmp_path: Path, records: list[tuple[str, tuple[int, ...], int, int]], match: str
) -> None:
    _refused(tmp_path / "x.gguf", _tensor_file(*records), match)


def test_unknown_tensor_type(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(_tensor_file(("a", (8,), 999, 0)))
    with pytest.raises(UnsupportedModelError, match="999"):
        GGUFSource(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A scratch path, a sound file's bytes, and its header's length."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "sound.gguf", tiny_config("llama"))
    data = (folder / "sound.gguf").read_bytes()
    header = GGUFSource(folder / "sound.gguf")._header_length
    return folder / "damaged.gguf", data, header


SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(st.data())
def test_truncation(sound: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, good, header = sound
    path.write_bytes(good[: data.draw(st.integers(0, header) | st.integers(0, len(good) - 1))])
    with pytest.raises(NanoVLLMError):
        load_model_files(str(path))


@SLOW
@given(st.data())
def test_mutated_headers(sound: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, good, header = sound
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 8))
        patch = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
        damaged[at : at + len(patch)] = patch
    path.write_bytes(damaged)
    tracemalloc.start()
    _open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
