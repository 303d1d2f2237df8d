"""Make the goldens: what transformers answers to the twenty prompts, greedily, in float32.

    python tests/exact/make_goldens.py MODEL.gguf [DIRECTORY]

Everything comes from transformers: weights through its own GGUF reader, tokens from its
tokenizer, attention by its eager implementation. Nothing of nanovllm is imported. Each
file holds the prompt's ids, 64 output ids, the top-2 margin of each step, and some logits
after the prompt. Fields of one prompt stand on lines of their own, so that diffs can be read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from golden_prompts import PROMPTS

NUM_TOKENS = 64
PROBE_STRIDE = 769  # every 769th logit after the prompt is kept: 64 of 49,152
HERE = Path(__file__).parent / "goldens"


def load_model(gguf: Path) -> Any:
    """transformers' Llama with the file's weights as float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def load_tokenizer(gguf: Path) -> Any:
    """transformers' tokenizer, with the digit splitting of SmolLM2's own tokenizer.json.

    transformers does not know GGUF's pre-tokenizer "smollm" and falls back to GPT-2's.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@torch.no_grad()
def answer(model: Any, prompt_ids: list[int]) -> dict[str, Any]:
    """Greedy `generate`, which does not stop at an end token."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt_ids])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = torch.cat(result.logits).topk(2).values
    return {
        "prompt_ids": prompt_ids,
        "output_ids": result.sequences[0, len(prompt_ids) :].tolist(),
        "margins": [round(margin, 5) for margin in (top[:, 0] - top[:, 1]).tolist()],
        "probe": [round(logit, 5) for logit in result.logits[0][0, ::PROBE_STRIDE].tolist()],
    }


def write(golden: dict[str, Any], path: Path) -> None:
    """One line a field."""
    lines = (f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in golden.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def make(gguf: Path, directory: Path) -> None:
    """All goldens into `directory`."""
    model, tokenizer = load_model(gguf), load_tokenizer(gguf)
    directory.mkdir(parents=True, exist_ok=True)
    for name, (text, length) in PROMPTS.items():
        write(answer(model, tokenizer.encode(text)[:length]), directory / f"{name}.json")
        print(name, file=sys.stderr)


def load(directory: Path = HERE) -> dict[str, dict[str, Any]]:
    """The goldens by name, in the order of the prompts."""
    return {name: json.loads((directory / f"{name}.json").read_text(encoding="utf-8")) for name in PROMPTS}


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else HERE)
