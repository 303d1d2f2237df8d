"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.models.hub import resolve


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2 GGUF file, downloaded once into the cache."""
    return resolve("smollm2", progress=False)
