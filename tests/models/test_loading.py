"""One door for every format: complete and consistent models, or one sentence and its mend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanovllm.errors import ModelFileError, ModelNotFoundError, NanoVLLMError, UnsupportedModelError
from nanovllm.models.loading import load_model_files, tiny_config
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weights import RandomSource, check_weights, expected_shapes


@pytest.mark.parametrize("kind", ["", "-qwen2", "-qwen3"])
def test_tiny_models(kind: str) -> None:
    first, again = load_model_files(f"tiny:random{kind}"), load_model_files(f"tiny:random{kind}")
    other = load_model_files(f"tiny:random{kind}", seed=1)
    assert first.config == again.config and first.path is None and first.tokenizer.vocab_size == 260
    assert first.weights.fingerprint() == again.weights.fingerprint() != other.weights.fingerprint()
    check_weights(first.weights, first.config)
    for name in first.weights.names():
        tensor = first.weights.get(name)
        assert tensor.shape == first.weights.shape(name) and tensor.dtype == torch.float32
        assert torch.equal(tensor, again.weights.get(name))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first.weights.get(name), other.weights.get(name))
    assert ("model.layers.0.self_attn.q_proj.bias" in first.weights.names()) == (kind == "-qwen2")
    assert ("model.layers.0.self_attn.q_norm.weight" in first.weights.names()) == (kind == "-qwen3")


def test_tiny_models_write_varied_text() -> None:
    """Greedy output depends on the prompt and does not settle on one token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = load_model_files("tiny:random").config
    shape = {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
    }
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    model = LlamaForCausalLM(LlamaConfig(**shape, **{name: getattr(config, name) for name in names}))
    source = RandomSource(config)
    model.load_state_dict({name: source.get(name) for name in source.names()})
    outputs = []
    for prompt in ([256, 72, 105], [256, 72, 106]):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(40):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        outputs.append(ids[0, 3:].tolist())
    assert outputs[0] != outputs[1]
    assert all(len(set(output)) > 10 for output in outputs)


def test_expected_shapes_are_transformers_parameters() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for architecture in ("llama", "qwen2", "qwen3"):
        ours = tiny_config(architecture)
        config = AutoConfig.for_model(
            architecture,
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            intermediate_size=ours.intermediate_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads,
            num_key_value_heads=ours.num_kv_heads,
            head_dim=ours.head_dim,
        )
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
        assert shapes == expected_shapes(ours)


def test_directory(tiny_directory: Path, tiny: ModelConfig) -> None:
    loaded = load_model_files(str(tiny_directory))
    assert loaded.config == tiny and loaded.path == tiny_directory
    assert loaded.tokenizer.eos_token_id == 257
    (tiny_directory / "generation_config.json").write_text('{"eos_token_id": [257, 259]}')
    assert load_model_files(str(tiny_directory)).config.eos_token_ids == (257, 259)


def test_the_tokenizer_supplies_a_missing_end_token(tiny_directory: Path) -> None:
    file = tiny_directory / "config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token_id"]
    file.write_text(json.dumps(settings))
    assert load_model_files(str(tiny_directory)).config.eos_token_ids == (257,)


def test_gguf(tiny_gguf: Path) -> None:
    loaded = load_model_files(str(tiny_gguf))
    assert loaded.path == tiny_gguf and loaded.config.eos_token_ids == (257,)
    assert loaded.tokenizer.encode("A<s>")[1] == 256


def _remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_remove("config.json"), "no config.json"),
        (_remove("tokenizer.json"), "no tokenizer.json"),
        (_remove("model.safetensors"), "neither"),
        (_write("config.json", "{"), "JSON"),
        (_write("config.json", "{}"), "model_type"),
        (_write("tokenizer_config.json", "3"), "object"),
        (_write("generation_config.json", "[]"), "object"),
    ],
)
def test_incomplete_directories(tiny_directory: Path, damage: Callable[[Path], object], match: str) -> None:
    damage(tiny_directory)
    with pytest.raises(ModelFileError, match=match) as caught:
        load_model_files(str(tiny_directory))
    assert caught.value.hint


def test_paths_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="empty"):
        load_model_files(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="no file"):
        load_model_files(str(tmp_path / "absent"))
    (tmp_path / "config.json").mkdir()
    with pytest.raises(NanoVLLMError):
        load_model_files(str(tmp_path))


def test_weights_that_do_not_fit_the_config(tiny_directory: Path, tiny: ModelConfig) -> None:
    source = RandomSource(tiny)
    tensors = {name: source.get(name) for name in source.names()}
    file, norm = tiny_directory / "model.safetensors", "model.norm.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != norm}, file)
    with pytest.raises(ModelFileError, match=r"lack the tensor 'model\.norm"):
        load_model_files(str(tiny_directory))
    save_file(tensors | {norm: torch.ones(63)}, file)
    with pytest.raises(ModelFileError, match="shape"):
        load_model_files(str(tiny_directory))
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, file)
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.bias"):
        load_model_files(str(tiny_directory))
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    load_model_files(str(tiny_directory))


def test_reading_models_needs_no_transformers() -> None:
    script = "import sys, nanovllm.models.loading as m; m.load_model_files('tiny:random'); "
    script += "print([n for n in ('transformers', 'huggingface_hub', 'tqdm') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "transformers" not in done.stdout and "huggingface_hub" not in done.stdout
