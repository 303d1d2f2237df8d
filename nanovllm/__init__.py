"""nano-vllm-hust: an LLM inference system whose long-lived state is first class.

What it is: the public names. What it knows nothing about: how they work.
Invariant: importing the package does not import torch; that happens on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.core.grammar import Grammar as Grammar
    from nanovllm.core.sampling_params import SamplingParams as SamplingParams
    from nanovllm.core.segments import Segment as Segment
    from nanovllm.llm import LLM as LLM
    from nanovllm.state.objects import Document as Document
    from nanovllm.state.objects import Session as Session
    from nanovllm.state.store import StateStore as StateStore

__version__ = "0.1.0"
__all__ = ["LLM", "Document", "Grammar", "SamplingParams", "Segment", "Session", "StateStore", "__version__"]

_HOMES = {
    "Document": "nanovllm.state.objects",
    "Grammar": "nanovllm.core.grammar",
    "LLM": "nanovllm.llm",
    "SamplingParams": "nanovllm.core.sampling_params",
    "Segment": "nanovllm.core.segments",
    "Session": "nanovllm.state.objects",
    "StateStore": "nanovllm.state.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
