"""Llama (arXiv 2302.13971; 2407.21783) and what shares its layer: SmolLM2, Llama 3, Mistral 7B.

What it is: the plain decoder. What it knows nothing about: anything beyond its name.
Its layer has no bias, and q and k are rotated as projected.
"""

from __future__ import annotations

from nanovllm.models.decoder import DecoderModel


class LlamaForCausalLM(DecoderModel):
    """The decoder as it stands in decoder.py."""
