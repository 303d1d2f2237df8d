"""Writers of small model files, independent of the readers under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weights import RandomSource

LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def ggml_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor, written independently of the loader's table."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{LLAMA_NAMES[part]}.{kind}"
    return f"{LLAMA_NAMES[stem]}.{kind}"


def interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def byte_vocabulary() -> list[str]:
    """260 tokens: the byte alphabet, then four control tokens."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path: Path, config: ModelConfig, **metadata: Any) -> None:
    """A complete GGUF model with the weights of RandomSource(config)."""
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(byte_vocabulary())
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), *value)
    source = RandomSource(config)
    for name in source.names():
        array = source.get(name).numpy()
        if config.architecture == "llama" and "q_proj" in name:
            array = interleave(array, config.num_heads)
        if config.architecture == "llama" and "k_proj" in name:
            array = interleave(array, config.num_kv_heads)
        writer.add_tensor(ggml_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a tiny model."""
    return {
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "torch_dtype": "float32",
    }


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json of the byte vocabulary."""
    tokens = byte_vocabulary()
    backend = Backend(BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[256:]])
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": "{{ messages[0].content }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
