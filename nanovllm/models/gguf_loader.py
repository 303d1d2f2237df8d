"""Weights from a GGUF file, under Hugging Face names and in Hugging Face layout.

What it is: a WeightSource over a parsed header, plus the file's metadata for config
and tokenizer. What it knows nothing about: the header's bytes, layers' arithmetic.
Invariant: a tensor leaves here exactly as the original checkpoint had it, up to
quantisation: renamed, row-major, query and key rows in half-split rotary order.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Q
from gguf.quants import dequantize

from nanovllm.errors import ModelFileError
from nanovllm.kernels.grouped_weight import GroupedWeight
from nanovllm.models.config_limits import unsupported
from nanovllm.models.fields import Fields
from nanovllm.models.gguf_groups import grouped_rows
from nanovllm.models.gguf_header import TensorInfo, parse_header
from nanovllm.models.weights import missing_tensor, sample

_QUANTISED = (Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K)
_PLAIN = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; foreign names stay as they are."""
    match = re.fullmatch(r"(?:blk\.(\d{1,5})\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = f"model.layers.{int(match[1])}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


class GGUFSource:
    """WeightSource over one .gguf file; `metadata` holds its key-value pairs.

    Raises ModelFileError for a damaged file, UnsupportedModelError for tensor types
    that are not implemented.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as handle:
                self._data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
            raise ModelFileError(f"{path} cannot be read: {error}.", param=str(path), hint="Check it.") from error
        header = parse_header(self._data)
        self.metadata: dict[str, Any] = header.metadata
        self._header_length = header.length
        self._rope_factors = header.tensors.pop(_ROPE_FACTORS, None)
        self._tensors = {hf_name(name): info for name, info in header.tensors.items()}
        self._rotary_heads = _rotary_heads(header.metadata)
        for info in header.tensors.values():
            if info.type not in _QUANTISED and info.type not in _PLAIN:
                raise unsupported(
                    f"GGUF tensor type {info.type.name} ({info.name[:80]})",
                    f"Supported are {', '.join(kind.name for kind in (*_PLAIN, *_QUANTISED))}.",
                )

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def get(self, name: str) -> torch.Tensor:
        tensor = self._read(self._info(name))
        projection = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if projection in self._rotary_heads:
            return _half_split(tensor, self._rotary_heads[projection], name)
        return tensor

    def grouped(self, name: str) -> GroupedWeight | None:
        info = self._info(name)
        rows = np.frombuffer(self._stored(info), np.uint8).reshape(info.shape[0], -1)
        weight = grouped_rows(rows, info.type) if len(info.shape) == 2 else None
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if weight is None or projection not in self._rotary_heads:
            return weight
        order = _half_split(torch.arange(info.shape[0]), self._rotary_heads[projection], name)
        return weight.reordered(order.numpy())

    def rope_factors(self) -> list[float] | None:
        """Divisors of the rotary frequencies (Llama 3.1 stores its scaling so), [head_dim / 2]."""
        if self._rope_factors is None:
            return None
        if self._rope_factors.type != Q.F32 or self._rope_factors.size > 2**16:
            raise ModelFileError(f"{_ROPE_FACTORS} is not a short float32 vector.", hint="Download the file again.")
        return self._read(self._rope_factors).flatten().tolist()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(len(self._data).to_bytes(8, "little"))
        digest.update(self._data[: self._header_length])
        with memoryview(self._data) as view:
            for info in self._tensors.values():
                with view[info.start : info.start + info.size] as stored:
                    digest.update(b"".join(sample(stored)))
        return digest.hexdigest()

    def close(self) -> None:
        self._data.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise missing_tensor(name)
        return self._tensors[name]

    def _read(self, info: TensorInfo) -> torch.Tensor:
        stored = self._stored(info)
        if info.type in _PLAIN:
            return torch.frombuffer(stored, dtype=_PLAIN[info.type]).reshape(info.shape)
        rows = np.frombuffer(stored, np.uint8).reshape(*info.shape[:-1], -1)
        with np.errstate(all="ignore"):  # damaged scales may overflow; the values are then merely wrong
            return torch.from_numpy(dequantize(rows, info.type)).reshape(info.shape)

    def _stored(self, info: TensorInfo) -> bytearray:
        # Slicing a mapping copies, so the tensor outlives close() and may be written to.
        return bytearray(self._data[info.start : info.start + info.size])


def _rotary_heads(metadata: dict[str, Any]) -> dict[str, int]:
    """Head count of each projection whose rows llama.cpp interleaved: q and k of `llama` only."""
    if metadata.get("general.architecture") != "llama":
        return {}
    fields = Fields(metadata, "GGUF", "llama.")
    heads = fields.integer("attention.head_count")
    return {"q_proj": heads, "k_proj": fields.integer("attention.head_count_kv", heads)}


def _half_split(tensor: torch.Tensor, heads: int, name: str) -> torch.Tensor:
    """Undo llama.cpp's row order: pairs (2i, 2i+1) of each head become (i, i + head_dim/2).

    tensor: [heads * head_dim, in] or [heads * head_dim]; same shape out. Source: `permute`
    in llama.cpp's convert_hf_to_gguf.py, of which this is the inverse.
    """
    if tensor.shape[0] % (2 * heads):
        raise ModelFileError(f"Tensor {name!r} has {tensor.shape[0]} rows, not {heads} even heads.", param=name)
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
