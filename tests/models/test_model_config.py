"""ModelConfig: both formats, RoPE against transformers, refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanovllm.errors import ModelFileError, NanoVLLMError, UnsupportedModelError
from nanovllm.models.model_config import ModelConfig

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.context_length": 4096,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 1000,
}
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 2048,
        "truncate": False,
        "beta_fast": 16,
    },
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "attention_factor": 1.3},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_inv_freq_equals_transformers(scaling: dict[str, Any], spelling: str) -> None:
    if spelling == "rope_parameters":
        config = {k: v for k, v in BASE.items() if k != "rope_theta"}
        config["rope_parameters"] = scaling | {"rope_theta": 500000.0}
    else:
        config = BASE | {"rope_scaling": scaling}
    ours = ModelConfig.from_hf(config)
    theirs = transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})
    if scaling["rope_type"] == "default":
        expected, factor = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs)
    torch.testing.assert_close(ours.inv_freq(), expected, rtol=1e-6, atol=0)
    assert ours.attention_scale == pytest.approx(64**-0.5 * factor**2)
    assert ours.rope_theta == 500000.0


def test_yarn_extends_the_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert ModelConfig.from_hf(BASE | {"rope_scaling": scaling}).max_position_embeddings == 16384


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", 7, None])
def test_other_scalings_are_refused_by_name(kind: object) -> None:
    scaling = {"rope_type": kind, "factor": 2.0}
    if kind is None:  # null counts as absent: the default
        assert ModelConfig.from_hf(BASE | {"rope_scaling": scaling}).rope_scaling is None
        return
    with pytest.raises(UnsupportedModelError, match=str(kind)):
        ModelConfig.from_hf(BASE | {"rope_scaling": scaling})


def test_rope_factors_divide_the_frequencies() -> None:
    plain = ModelConfig.from_gguf(GGUF)
    divided = ModelConfig.from_gguf(GGUF, rope_factors=[2.0] * 32)
    torch.testing.assert_close(divided.inv_freq(), plain.inv_freq() / 2)
    with pytest.raises(ModelFileError):
        ModelConfig.from_gguf(GGUF, rope_factors=[2.0] * 31)
    with pytest.raises(ModelFileError):
        ModelConfig.from_gguf(GGUF, rope_factors=[0.0] * 32)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            "layer_types",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            "layer_types",
        ),
    ],
)
def test_features_are_refused_by_name(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        ModelConfig.from_hf(BASE | change)


def test_sliding_window() -> None:
    def window(**change: Any) -> int | None:
        return ModelConfig.from_hf(BASE | change).sliding_window

    assert window(sliding_window=64) is None  # plain Llama has none
    assert window(model_type="mistral", sliding_window=64) == 64
    assert window(model_type="mistral", sliding_window=None) is None
    assert window(model_type="qwen2", sliding_window=64, use_sliding_window=False, max_window_layers=2) is None
    assert window(model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=0) == 64
    assert window(model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=28) is None


def test_architectures_and_ids() -> None:
    qwen2 = ModelConfig.from_hf(BASE | {"model_type": "qwen2"}, {"eos_token_id": [5, 6], "bos_token_id": 4})
    assert (qwen2.attention_bias, qwen2.qk_norm, qwen2.eos_token_ids, qwen2.bos_token_id) == (
        True,
        False,
        (5, 6),
        4,
    )
    qwen3 = ModelConfig.from_hf(BASE | {"model_type": "qwen3", "eos_token_id": 9})
    assert (qwen3.attention_bias, qwen3.qk_norm, qwen3.eos_token_ids, qwen3.head_dim) == (
        False,
        True,
        (9,),
        128,
    )
    assert ModelConfig.from_hf(BASE | {"model_type": "mistral"}).architecture == "llama"


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": 2**40},
        {"hidden_size": "64"},
        {"hidden_size": 64.5},
        {"hidden_size": True},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"num_hidden_layers": 10**9},
        {"vocab_size": None},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"rope_scaling": [1]},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [-1]},
        {"hidden_size": 2**20, "intermediate_size": 2**20, "num_hidden_layers": 1024, "vocab_size": 2**20},
    ],
    ids=str,
)
def test_absurd_values_are_file_errors(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        ModelConfig.from_hf(BASE | change)


def test_gguf_features() -> None:
    with pytest.raises(UnsupportedModelError, match="gemma"):
        ModelConfig.from_gguf(GGUF | {"general.architecture": "gemma"})
    with pytest.raises(UnsupportedModelError, match="expert_count"):
        ModelConfig.from_gguf(GGUF | {"llama.expert_count": 8})
    with pytest.raises(UnsupportedModelError, match="split into 3"):
        ModelConfig.from_gguf(GGUF | {"split.count": 3})
    with pytest.raises(UnsupportedModelError, match="longrope"):
        ModelConfig.from_gguf(GGUF | {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="dimension_count"):
        ModelConfig.from_gguf(GGUF | {"llama.rope.dimension_count": 32})
    scaled = ModelConfig.from_gguf(GGUF | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    torch.testing.assert_close(scaled.inv_freq(), ModelConfig.from_gguf(GGUF).inv_freq() / 2)
    eos = ModelConfig.from_gguf(GGUF | {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 4})
    assert eos.eos_token_ids == (3, 4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
HF_KEYS = [
    *BASE, "head_dim", "rms_norm_eps", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
    "layer_types", "max_window_layers", "eos_token_id", "torch_dtype", "dtype", "quantization_config", "hidden_act",
]  # fmt: skip
ROPE_KEYS = [
    "rope_type",
    "type",
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "rope_theta",
    "low_freq_factor",
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.dictionaries(st.sampled_from(HF_KEYS), JSON, max_size=3),
    st.dictionaries(st.sampled_from(ROPE_KEYS), JSON | st.sampled_from(["yarn", "linear", "llama3"]), max_size=4),
)
def test_any_json_is_read_or_refused(kind: str, change: dict[str, Any], rope: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_hf(BASE | {"model_type": kind, "rope_scaling": rope} | change)
    except NanoVLLMError:
        return
    assert config.inv_freq().shape == (config.head_dim // 2,)
    assert config.attention_scale > 0


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(GGUF)), JSON, max_size=3))
def test_any_metadata_is_read_or_refused(change: dict[str, Any]) -> None:
    try:
        ModelConfig.from_gguf(GGUF | change)
    except NanoVLLMError:
        return
