"""The caps on a model's dimensions and the names of what is implemented.

What it is: constants and two refusals shared by the readers of config.json and of
GGUF metadata. What it knows nothing about: either format. Invariant: the caps are
far above any published model and far below what could overflow an allocation.
"""

from __future__ import annotations

from nanovllm.errors import UnsupportedModelError
from nanovllm.models.rope import SCALING_KINDS

ARCHITECTURES = ("llama", "qwen2", "qwen3")
MAX_VOCAB = 2**22
MAX_WIDTH = 2**20
MAX_LAYERS = 2**10
MAX_HEADS = 2**12
MAX_HEAD_DIM = 2**12
MAX_POSITIONS = 2**24


def unsupported(feature: str, hint: str | None = None) -> UnsupportedModelError:
    """The refusal of a sound file that uses `feature`."""
    return UnsupportedModelError(
        f"The model uses {feature}, which is not implemented.",
        hint=hint or f"Supported are dense {', '.join(ARCHITECTURES)} models.",
    )


def unsupported_rope(kind: object) -> UnsupportedModelError:
    """The refusal of a RoPE scaling by name."""
    return unsupported(f"RoPE scaling {kind!r}", f"Supported scalings are {', '.join(SCALING_KINDS)}.")
