"""Reading Hugging Face config.json into the fields of a ModelConfig.

What it is: one pure function, `parse`. What it knows nothing about: paths, weights.
Invariant: features of the file that the forward pass lacks are refused by name,
never ignored. Both spellings of RoPE settings are read: `rope_theta` with
`rope_scaling`, and the `rope_parameters` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.models import config_limits as limits
from nanovllm.models.config_limits import unsupported, unsupported_rope
from nanovllm.models.fields import Fields
from nanovllm.models.rope import SCALING_KINDS, RopeScaling, yarn_attention_factor

# Mistral is Llama with a window that covers every layer; the forward pass is the same.
_MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_DTYPES = ("float32", "float16", "bfloat16")
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


def parse(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ModelConfig.

    Raises UnsupportedModelError naming the feature, ModelFileError for bad values.
    """
    fields = Fields(config, "config.json")
    model_type = fields.text("model_type")
    if model_type not in _MODEL_TYPES:
        raise unsupported(f"architecture {model_type!r}")
    architecture = _MODEL_TYPES[model_type]
    _refuse_features(fields, architecture)
    dimensions = _dimensions(fields, model_type)
    positions = fields.integer("max_position_embeddings", _DEFAULT_POSITIONS[model_type], high=limits.MAX_POSITIONS)
    theta, scaling = _rope(fields, positions)
    if scaling and scaling.kind == "yarn":  # published with the unextended length; the extension is the point
        positions = max(positions, int(scaling.original_max_position * scaling.factor))
    return (
        dimensions
        | {
            "architecture": architecture,
            "rms_norm_eps": fields.number("rms_norm_eps", 1e-6, high=1.0),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "max_position_embeddings": positions,
            "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
            "attention_bias": architecture == "qwen2",
            "qk_norm": architecture == "qwen3",
            "sliding_window": _sliding_window(fields, model_type, dimensions["num_layers"]),
            "torch_dtype": _dtype(fields),
        }
        | _token_ids(fields, Fields(generation, "generation_config.json"))
    )


def _dimensions(fields: Fields, model_type: str) -> dict[str, int]:
    hidden = fields.integer("hidden_size", high=limits.MAX_WIDTH)
    heads = fields.integer("num_attention_heads", high=limits.MAX_HEADS)
    head_dim = fields.integer("head_dim", 128 if model_type == "qwen3" else None, high=limits.MAX_HEAD_DIM)
    if head_dim is None and hidden % heads:
        raise fields.bad("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
    return {
        "vocab_size": fields.integer("vocab_size", high=limits.MAX_VOCAB),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size", high=limits.MAX_WIDTH),
        "num_layers": fields.integer("num_hidden_layers", high=limits.MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads, high=limits.MAX_HEADS),
        "head_dim": head_dim or hidden // heads,
    }


def _refuse_features(fields: Fields, architecture: str) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise unsupported(f"hidden_act {activation!r}")
    if fields.boolean("mlp_bias", False):
        raise unsupported("mlp_bias")
    if architecture != "qwen2" and fields.boolean("attention_bias", False):
        raise unsupported("attention_bias (a bias on the output projection too)")
    if (partial := fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise unsupported(f"partial_rotary_factor {partial:g}")
    if quantization := fields.raw("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise unsupported(f"quantization_config {method!r}", "Use an unquantised checkpoint or a GGUF file.")


def _sliding_window(fields: Fields, model_type: str, num_layers: int) -> int | None:
    """The window all layers share, or None. A mix of windowed and full layers is refused."""
    if model_type == "llama" or (model_type != "mistral" and not fields.boolean("use_sliding_window", False)):
        return None
    window = fields.integer("sliding_window", None)
    if window is None:
        return None
    layer_types = fields.raw("layer_types")
    if layer_types is None:
        full_layers = 0 if model_type == "mistral" else fields.integer("max_window_layers", 28, low=0)
        layer_types = ["full_attention"] * full_layers + ["sliding_attention"] * num_layers
    listed = layer_types[:num_layers] if isinstance(layer_types, list) else [layer_types]
    kinds = {str(kind) for kind in listed}
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise unsupported("sliding-window attention in some layers only (layer_types / max_window_layers)")
    return window


def _rope(fields: Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling); the transformers-5 object holds both, older files keep theta beside it."""
    nested = fields.raw("rope_parameters", fields.raw("rope_scaling", {}))
    if not isinstance(nested, Mapping):
        raise fields.bad("rope_scaling", nested, "an object")
    settings = Fields(nested, "config.json (RoPE settings)")
    theta = settings.number("rope_theta", None, low=1.0) or fields.number("rope_theta", 10000.0, low=1.0)
    if (partial := settings.number("partial_rotary_factor", 1.0)) != 1.0:
        raise unsupported(f"partial_rotary_factor {partial:g}")
    kind = settings.raw("rope_type", settings.raw("type", "default"))
    if kind == "default" or not nested:
        return theta, None
    if kind not in SCALING_KINDS:
        raise unsupported_rope(kind)
    original = settings.integer("original_max_position_embeddings", positions, high=limits.MAX_POSITIONS)
    return theta, _scaling(kind, settings, original, positions)


def _scaling(kind: str, settings: Fields, original: int, positions: int) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind, settings.number("factor", high=1e6))
    if kind == "llama3":
        low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
        if low >= high:
            raise settings.bad("low_freq_factor", low, f"below high_freq_factor {high:g}")
        return RopeScaling(kind, settings.number("factor", high=1e6), original, low, high)
    factor = settings.number("factor", max(positions / original, 1.0), high=1e6)
    mscale, all_dim = settings.number("mscale", None), settings.number("mscale_all_dim", None)
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=settings.number("beta_fast", 32.0),
        beta_slow=settings.number("beta_slow", 1.0),
        truncate=settings.boolean("truncate", True),
        attention_factor=settings.number("attention_factor", yarn_attention_factor(factor, mscale, all_dim)),
    )


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype", fields.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in _DTYPES:
        raise unsupported(f"torch_dtype {name!r}", f"Supported are {', '.join(_DTYPES)}.")
    return name


def _token_ids(config: Fields, generation: Fields) -> dict[str, Any]:
    bos = generation.token_ids("bos_token_id") or config.token_ids("bos_token_id")
    eos = generation.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    return {"eos_token_ids": eos, "bos_token_id": bos[0] if bos else None}
