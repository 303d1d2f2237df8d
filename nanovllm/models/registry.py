"""Which class computes which architecture.

What it is: one table. What it knows nothing about: files. An architecture that is
not in it was refused when its config was read.
"""

from __future__ import annotations

from nanovllm.models.decoder import DecoderModel
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

ARCHITECTURES: dict[str, type[DecoderModel]] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
