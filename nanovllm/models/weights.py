"""Where weights come from: one protocol, and the check every source must pass.

What it is: `WeightSource`, the tensors a config calls for, and the comparison of the
two before anything large is allocated. What it knows nothing about: file formats,
layers' arithmetic, devices. Invariant: names are Hugging Face names, whatever the
file called them; shapes are [out, in] for projections.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from nanovllm.errors import ModelFileError, UnsupportedModelError
from nanovllm.kernels.grouped_weight import GroupedWeight
from nanovllm.models.model_config import ModelConfig

# Tables recomputed from the config; old checkpoints carry them along.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_SAMPLE_BYTES = 4096


class WeightSource(Protocol):
    """Tensors by name, read on demand so that a caller may stream them to a device."""

    def names(self) -> Iterable[str]:
        """Every tensor's Hugging Face name, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor without reading it. ModelFileError if there is none of this name."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the dtype it is stored in (float32 if quantised).

        The caller must not write to it: it may alias the file. ModelFileError if missing.
        """
        ...

    def grouped(self, name: str) -> GroupedWeight | None:
        """The same tensor as the file's own whole numbers in groups; None where it has none, or other ones."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 identifying weights and quantisation; equal files give equal fingerprints.

        It covers headers, sizes and `sample` of every tensor's stored bytes, not all of
        them: cheap at load, and enough to tell fine-tunes and quantisations apart. It is
        not a proof against a forger who edits a tensor's unsampled bytes.
        """
        ...

    def close(self) -> None:
        """Release the files; `get` must not be called afterwards."""
        ...


def sample(buffer: memoryview | bytes) -> Iterator[bytes]:
    """The bytes of one tensor that a fingerprint covers: first, middle and last 4 KiB."""
    middle = max(0, (len(buffer) - _SAMPLE_BYTES) // 2)
    for start in (0, middle, max(0, len(buffer) - _SAMPLE_BYTES)):
        yield bytes(buffer[start : start + _SAMPLE_BYTES])


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the forward pass reads, by Hugging Face name, with its shape."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    layer = _layer_shapes(config)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        shapes |= {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", query), ("k", key), ("v", key))}
    if config.qk_norm:
        shapes |= {f"self_attn.{p}_norm.weight": (config.head_dim,) for p in "qk"}
    return shapes


def check_weights(source: WeightSource, config: ModelConfig) -> None:
    """Compare a source with its config before loading.

    Raises ModelFileError for a missing or misshapen tensor, UnsupportedModelError for a
    tensor the forward pass would silently leave out (a bias, an expert, a second norm).
    """
    expected, present = expected_shapes(config), set(source.names())
    for name, shape in expected.items():
        if name not in present:
            raise missing_tensor(name)
        found = source.shape(name)
        if found != shape:
            raise ModelFileError(
                f"Tensor {name!r} has shape {list(found)}, but the configuration asks for {list(shape)}.",
                param=name,
                hint="Configuration and weights belong to different models; download both again.",
            )
    for name in sorted(present - expected.keys()):
        if name != "lm_head.weight" and not name.endswith(_IGNORED_SUFFIXES):
            raise UnsupportedModelError(
                f"The model has a tensor {name!r}, which {config.architecture!r} here does not use.",
                param=name,
                hint="It is a variant that is not implemented.",
            )


def missing_tensor(name: str) -> ModelFileError:
    """The error for a tensor that no file holds."""
    return ModelFileError(
        f"The weights lack the tensor {name!r}.",
        param=name,
        hint="The download is incomplete; fetch it again.",
    )


class RandomSource:
    """Weights drawn from a seed, for the built-in tiny models: no file, any platform, same values.

    Norm gains are 1, biases N(0, 0.02²), projections N(0, 4/fan_in): wide enough that
    greedy output varies with the prompt instead of repeating one token.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._seed, self._shapes = seed, expected_shapes(config)
        self._identity = repr((config, seed))

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise missing_tensor(name)
        return self._shapes[name]

    def get(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.randn(shape, generator=generator, dtype=torch.float32)
        return values * self._scale(name, shape)

    def grouped(self, name: str) -> GroupedWeight | None:
        """Nothing is quantised."""
        return None

    @staticmethod
    def _scale(name: str, shape: tuple[int, ...]) -> float:
        if name.endswith("bias"):
            return 0.02
        if name.startswith("model.embed_tokens"):
            return 1.0
        if name.startswith("lm_head"):
            return 0.3  # logits of a few units: temperature 1 neither picks one token nor all alike
        return 2.0 / math.sqrt(shape[-1])

    def fingerprint(self) -> str:
        return hashlib.sha256(f"random:{self._identity}".encode()).hexdigest()

    def close(self) -> None:
        """Nothing is held open."""
