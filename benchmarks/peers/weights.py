"""The values of our model file as a Hugging Face directory: bf16 safetensors, config and tokenizer.

Written once per model under the cache folder; its name carries the fingerprint of the source's weights.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanovllm.models.loading import LoadedModel, load_model_files

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def exported(model: str, folder: Path) -> tuple[Path, Path | None]:
    """The directory in bf16, and the GGUF file itself where `model` is one."""
    files = load_model_files(model)
    try:
        home = folder / "weights" / files.weights.fingerprint()[:16]
        if not home.exists():
            _write(files, home)
    finally:
        files.weights.close()
    return home, files.path if files.path is not None and files.path.is_file() else None


def _write(files: LoadedModel, home: Path) -> None:
    scratch = home.with_name(f"{home.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        tensors = {name: files.weights.get(name).to(torch.bfloat16).contiguous() for name in files.weights.names()}
        if files.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        save_file(tensors, str(scratch / "model.safetensors"), {"format": "pt"})
        _write_json(scratch / "config.json", hf_config(files))
        (scratch / "tokenizer.json").write_text(files.tokenizer.vocabulary(), encoding="utf-8")
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0]['content'] }}"}
        _write_json(scratch / "tokenizer_config.json", {**names, "eos_token": _eos(files)})
        os.replace(scratch, home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def hf_config(files: LoadedModel) -> dict[str, Any]:
    """config.json as transformers and vLLM read it. Plain rope only: what it cannot say is refused."""
    c = files.config
    if c.rope_scaling is not None or c.rope_factors is not None or c.sliding_window is not None:
        raise SystemExit("only models with plain rope and full attention are exported for the peers")
    return {
        "architectures": [CLASSES[c.architecture]], "model_type": c.architecture, "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta, "hidden_act": "silu",
        "tie_word_embeddings": c.tie_word_embeddings, "max_position_embeddings": c.max_position_embeddings,
        "bos_token_id": c.bos_token_id, "eos_token_id": list(c.eos_token_ids)[:1][0] if c.eos_token_ids else None,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def _eos(files: LoadedModel) -> str | None:
    ids = files.config.eos_token_ids
    return files.tokenizer.id_to_token(ids[0]) if ids else None


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
