"""From a model's name to everything the engine needs to build it.

What it is: the one door through which models come in, whichever format they have.
What it knows nothing about: layers, devices, the engine. Invariant: a `LoadedModel`
is complete and consistent; its weights were checked against its config, by name and
shape, before any of them was read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nanovllm.errors import ModelFileError, ModelNotFoundError
from nanovllm.models.byte_tokenizer import ByteTokenizer
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.models.gguf_loader import GGUFSource
from nanovllm.models.hub import TINY_MODELS, resolve
from nanovllm.models.json_file import read_json
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.safetensors_loader import SafetensorsSource
from nanovllm.models.tokenizer import Tokenizer
from nanovllm.models.weights import RandomSource, WeightSource, check_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be built. `source` is the name asked for; `path` is None for built-in ones.

    Whoever builds it closes `weights` once the last tensor is copied.
    """

    config: ModelConfig
    weights: WeightSource
    tokenizer: ChatTokenizer
    source: str
    path: Path | None


def load_model_files(model: str, *, progress: bool = True, seed: int = 0) -> LoadedModel:
    """Resolve `model` and open its files; no weight is read yet.

    `seed` draws the weights of the built-in `tiny:random*` models. Raises
    ModelNotFoundError, ModelFileError or UnsupportedModelError.
    """
    if model in TINY_MODELS:
        config = tiny_config(model.removeprefix("tiny:random").lstrip("-") or "llama")
        return LoadedModel(config, RandomSource(config, seed), ByteTokenizer(), model, None)
    path = resolve(model, progress)
    return _load_gguf(path, model) if path.is_file() else _load_directory(path, model)


def tiny_config(architecture: str) -> ModelConfig:
    """The shape of the built-in random models: two layers, 260 byte-level tokens."""
    return ModelConfig(
        architecture=architecture,
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        eos_token_ids=(257,),
        bos_token_id=256,
    )


def _load_gguf(path: Path, source: str) -> LoadedModel:
    weights = GGUFSource(path)
    try:
        config = ModelConfig.from_gguf(
            weights.metadata,
            tie_word_embeddings="lm_head.weight" not in weights.names(),
            rope_factors=weights.rope_factors(),
        )
        check_weights(weights, config)
        tokenizer = Tokenizer.from_gguf(weights.metadata)
        return LoadedModel(_with_eos(config, tokenizer), weights, tokenizer, source, path)
    except Exception:
        weights.close()
        raise


def _load_directory(path: Path, source: str) -> LoadedModel:
    if not any(path.iterdir()):
        raise ModelNotFoundError(f"The directory {path} is empty.", param="model", hint="Download a model into it.")
    if not (path / "config.json").is_file():
        raise ModelFileError(
            f"The directory {path} has no config.json.",
            param="model",
            hint="Point to a Hugging Face model directory, or to the .gguf file itself.",
        )
    generation = read_json(path / "generation_config.json", missing={})
    config = ModelConfig.from_hf(read_json(path / "config.json"), generation)
    tokenizer = Tokenizer.from_directory(path)
    weights = SafetensorsSource(path)
    try:
        check_weights(weights, config)
    except Exception:
        weights.close()
        raise
    return LoadedModel(_with_eos(config, tokenizer), weights, tokenizer, source, path)


def _with_eos(config: ModelConfig, tokenizer: ChatTokenizer) -> ModelConfig:
    """A config that names no end token takes the tokenizer's."""
    if config.eos_token_ids or tokenizer.eos_token_id is None:
        return config
    return replace(config, eos_token_ids=(tokenizer.eos_token_id,))
