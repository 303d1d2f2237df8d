"""Where the engines of experiment 4 come from: one model loaded once, or none and a virtual clock.

What it is: a factory with one question, an engine of so many blocks, in a state nobody has
touched. What it knows nothing about: workloads, bundles. Invariants: engines that follow one another share the model
and nothing else; the simulated ones are equal to the nanosecond on any machine, and borrow
the KV shape of SmolLM2-135M, so that sizes can be told: these are `estimated` in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.run_header import run_header
from nanovllm.lab.fresh_engine import fresh_engine
from nanovllm.lab.simulated import simulated_engine
from nanovllm.observe.capacity import KVShape
from nanovllm.observe.records import RunHeader

SIMULATED_SHAPE = KVShape(num_layers=30, num_kv_heads=3, head_dim=64, dtype_bytes=2)  # SmolLM2-135M in bfloat16
SIMULATED_VOCAB = 256


class EngineSource(Protocol):
    """What a run needs."""

    @property
    def vocab(self) -> int:
        """Token ids there are."""

    def engine(self, num_blocks: int) -> LLMEngine:
        """A cold engine of so many blocks. The one before must have ended."""

    def header(self, engine: LLMEngine, command: str) -> RunHeader:
        """What is about to run on it."""

    def facts(self) -> dict[str, Any]:
        """The model, for the manifest."""


@dataclass
class SimulatedSource:
    """No model: a cost table and a virtual clock."""

    config: EngineConfig
    settings: dict[str, Any]
    vocab: int = SIMULATED_VOCAB

    def engine(self, num_blocks: int) -> LLMEngine:
        """A new engine with a clock of its own, which starts at 0."""
        return simulated_engine(num_blocks, **self.settings)

    def header(self, engine: LLMEngine, command: str) -> RunHeader:
        """With the bytes of a block that the model it stands for would have."""
        block_bytes = SIMULATED_SHAPE.token_bytes * self.config.block_size
        header = run_header(engine, self.config, command)
        return replace(header, model="simulated (KV shape of SmolLM2-135M)", block_bytes=block_bytes, dtype="bfloat16")

    def facts(self) -> dict[str, Any]:
        """The arithmetic of a token's bytes."""
        return {"kv_shape": SIMULATED_SHAPE.formula, "num_threads": 0, "device": "none"}


@dataclass
class ModelSource:
    """One loaded model, whose pool is as large as the largest that will be asked for."""

    loaded: LLMEngine
    config: EngineConfig

    @property
    def vocab(self) -> int:
        """Token ids there are."""
        return self.loaded.intake.vocab_size

    def engine(self, num_blocks: int) -> LLMEngine:
        """Fresh books around the loaded model."""
        return fresh_engine(self.loaded, self.config, num_blocks)

    def header(self, engine: LLMEngine, command: str) -> RunHeader:
        """As the engine says; of a path only its name."""
        header = run_header(engine, self.config, command)
        return replace(header, model=header.model.rpartition("/")[2] if header.model.startswith("/") else header.model)

    def facts(self) -> dict[str, Any]:
        """The arithmetic of a token's bytes, and what computes."""
        import torch

        model: Any = self.loaded.parts.identity["model"]
        tier = self.loaded.parts.device_tier
        assert tier is not None
        shape = KVShape(model["num_layers"], model["num_kv_heads"], model["head_dim"], tier.pool.element_size())
        return {"kv_shape": shape.formula, "num_threads": torch.get_num_threads(), "device": str(tier.pool.device)}


@contextmanager
def open_source(
    model: str | None, settings: dict[str, Any], max_blocks: int, max_tokens: int
) -> Iterator[EngineSource]:
    """The source for `model`; without one the simulated. Raises what loading raises."""
    if model is None:
        yield SimulatedSource(EngineConfig.from_kwargs("tiny:random", **settings), settings)
        return
    from nanovllm.engine.build import build_engine

    config = EngineConfig.from_kwargs(model, num_blocks=max_blocks, max_model_len=max_tokens, **settings)
    loaded = build_engine(config, progress=False)
    try:
        yield ModelSource(loaded, config)
    finally:
        loaded.close()
