"""Reading GGUF metadata into the fields of a ModelConfig.

What it is: one pure function, `parse`. What it knows nothing about: the file's bytes
(`gguf_header` read them) and its tensors. Invariant: as in `config_hf`, what is not
implemented is refused by name. Source: the GGUF specification and the key names in
llama.cpp's `gguf-py/gguf/constants.py`; keys start with `general.architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.models import config_limits as limits
from nanovllm.models.config_limits import unsupported, unsupported_rope
from nanovllm.models.fields import Fields
from nanovllm.models.rope import RopeScaling, yarn_attention_factor

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def parse(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ModelConfig, except what only the tensors tell (tying, rope_freqs).

    Raises UnsupportedModelError naming the feature, ModelFileError for bad values.
    """
    general, tokenizer = Fields(metadata, "GGUF"), Fields(metadata, "GGUF", "tokenizer.ggml.")
    architecture = general.text("general.architecture")
    if architecture not in limits.ARCHITECTURES:
        raise unsupported(f"architecture {architecture!r}")
    fields = Fields(metadata, "GGUF", architecture + ".")
    if fields.integer("expert_count", 0, low=0):
        raise unsupported("a mixture of experts (expert_count)")
    if (shards := general.integer("split.count", 0, low=0)) > 1:
        raise unsupported(f"a GGUF file split into {shards}", "Join it with llama.cpp's gguf-split --merge.")
    dimensions = _dimensions(fields, metadata)
    positions = fields.integer("context_length", high=limits.MAX_POSITIONS)
    bos = tokenizer.token_ids("bos_token_id")
    eos = [i for key in _EOS_KEYS for i in tokenizer.token_ids(key)]
    return dimensions | {
        "architecture": architecture,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", high=1.0),
        "rope_theta": fields.number("rope.freq_base", 10000.0, low=1.0),
        "rope_scaling": _scaling(fields, positions),
        "max_position_embeddings": positions,
        "attention_bias": architecture == "qwen2",
        "qk_norm": architecture == "qwen3",
        "sliding_window": fields.integer("attention.sliding_window", 0, low=0) or None,
        "eos_token_ids": tuple(dict.fromkeys(eos)),
        "bos_token_id": bos[0] if bos else None,
    }


def _dimensions(fields: Fields, metadata: Mapping[str, Any]) -> dict[str, int]:
    hidden = fields.integer("embedding_length", high=limits.MAX_WIDTH)
    heads = fields.integer("attention.head_count", high=limits.MAX_HEADS)
    if hidden % heads and fields.raw("attention.key_length") is None:
        raise fields.bad("attention.head_count", heads, f"a divisor of embedding_length {hidden}")
    head_dim = fields.integer("attention.key_length", hidden // heads, high=limits.MAX_HEAD_DIM)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim, low=0) != head_dim:
            raise unsupported(f"{key} {fields.raw(key)} with heads of {head_dim}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = len(tokens) if isinstance(tokens, list) else None
    return {
        "vocab_size": fields.integer("vocab_size", vocab, high=limits.MAX_VOCAB) or fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length", high=limits.MAX_WIDTH),
        "num_layers": fields.integer("block_count", high=limits.MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": fields.integer("attention.head_count_kv", heads, high=limits.MAX_HEADS),
        "head_dim": head_dim,
    }


def _scaling(fields: Fields, positions: int) -> RopeScaling | None:
    factor = fields.number("rope.scaling.factor", None, high=1e6) or fields.number("rope.scale_linear", 1.0)
    kind = fields.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return RopeScaling(kind, factor)
    if kind != "yarn":
        raise unsupported_rope(kind)
    original = fields.integer("rope.scaling.original_context_length", positions, high=limits.MAX_POSITIONS)
    extra = fields.number("rope.scaling.attn_factor", 1.0)
    temperature = extra * yarn_attention_factor(factor, None, None)
    return RopeScaling(kind, factor, original, attention_factor=temperature)
