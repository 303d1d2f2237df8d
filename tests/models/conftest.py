"""Small model files written afresh for each test that damages or reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from model_files import hf_config, write_gguf, write_tokenizer
from safetensors.torch import save_file

from nanovllm.models.loading import tiny_config
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weights import RandomSource, expected_shapes


@pytest.fixture
def tiny() -> ModelConfig:
    return tiny_config("llama")


@pytest.fixture
def tiny_gguf(tmp_path: Path, tiny: ModelConfig) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny)
    return path


@pytest.fixture
def tiny_directory(tmp_path: Path, tiny: ModelConfig) -> Path:
    """A Hugging Face directory with one safetensors file."""
    directory = tmp_path / "model"
    directory.mkdir()
    source = RandomSource(tiny)
    save_file({name: source.get(name) for name in expected_shapes(tiny)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(hf_config(tiny)))
    write_tokenizer(directory)
    return directory


@pytest.fixture
def gguf_of(tmp_path: Path) -> Callable[..., Path]:
    """Write a GGUF with named arrays of given ggml types: name -> (array, type or None)."""

    def write(tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]], arch: str = "qwen2") -> Path:
        path = tmp_path / "arrays.gguf"
        writer = gguf.GGUFWriter(path, arch)
        for name, (array, kind) in tensors.items():
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
