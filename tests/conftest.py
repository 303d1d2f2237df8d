"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovllm.models.hub import resolve


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2 GGUF file, downloaded once into the cache."""
    return resolve("smollm2", progress=False)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Whatever count of threads the test sets, the next one has it as it was."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs the default model, so that `-m "not model"` runs without a network."""
    for item in items:
        if "smollm2_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)
