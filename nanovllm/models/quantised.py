"""A model with its linears in 8-bit groups, whichever format it comes in.

What it is: a WeightSource over another one. What it knows nothing about: products, which rows are computed from codes.
Invariants: `get` is what `grouped` stands for, so that every kernel set computes with the same weights; groups that a
file has itself stay as they are, being no larger and exact; lookups of embeddings, norms and biases are the source's;
the fingerprint is not the source's, since KV that these weights made is another model's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch

from nanovllm.errors import ConfigError
from nanovllm.kernels.grouped_weight import GROUP, GroupedWeight
from nanovllm.models.loading import LoadedModel
from nanovllm.models.weights import WeightSource

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def in_eight_bits(loaded: LoadedModel) -> LoadedModel:
    """`loaded` with its linears quantised; a head that was the embedding becomes a weight of its own.

    Raises ConfigError where inputs are not whole groups; `loaded` is closed then.
    """
    config = loaded.config
    widths = (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    if odd := [width for width in widths if width % GROUP]:
        loaded.weights.close()
        raise ConfigError(
            f"quantization int8 needs inputs in multiples of {GROUP}; the model has linears of {odd[0]} inputs.",
            param="quantization",
            hint="Leave quantization out for this model.",
        )
    weights = QuantisedWeights(loaded.weights, head=EMBEDDING if config.tie_word_embeddings else HEAD)
    return replace(loaded, config=replace(config, tie_word_embeddings=False), weights=weights)


class QuantisedWeights:
    """WeightSource; `head` is the name under which `source` has the head. `str` tells what was done so far."""

    def __init__(self, source: WeightSource, head: str) -> None:
        self._source, self._head = source, head
        self._made: set[str] = set()
        self._found: set[str] = set()

    def __str__(self) -> str:
        return f"{len(self._made)} weights quantised, {len(self._found)} as the file has them"

    def names(self) -> Iterable[str]:
        return dict.fromkeys((*self._source.names(), HEAD))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored(name))

    def get(self, name: str) -> torch.Tensor:
        groups = self.grouped(name)
        return self._source.get(name) if groups is None else groups.restored()

    def grouped(self, name: str) -> GroupedWeight | None:
        if name != HEAD and not name.endswith("_proj.weight"):
            return None
        stored = self._stored(name)
        if (groups := self._source.grouped(stored)) is not None:
            self._found.add(name)
            return groups
        self._made.add(name)
        return GroupedWeight.quantised(self._source.get(stored))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"int8 in groups of {GROUP}: {self._source.fingerprint()}".encode()).hexdigest()

    def close(self) -> None:
        self._source.close()

    def _stored(self, name: str) -> str:
        return self._head if name == HEAD else name
