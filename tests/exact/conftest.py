"""Engines shared by the exactness tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovllm import LLM


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two kernel threads beside another busy process wait for each other at every operation."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[LLM]:
    """SmolLM2 in float32 with an empty past: nothing in it is reused unless a test asks for it."""
    with LLM(str(smollm2_path), dtype="float32", kv_memory="512MiB", prefix_mode="off", progress=False) as llm:
        yield llm
