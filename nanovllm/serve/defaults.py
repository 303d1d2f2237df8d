"""Sampling defaults that a model brings: its generation_config.json.

What it is: the four fields that other servers take from it too. What it knows nothing
about: requests. Invariant: a file that is not sound changes nothing but the log.
"""

from __future__ import annotations

import logging
from typing import Any

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import NanoVLLMError
from nanovllm.models.hub import resolve
from nanovllm.models.json_file import read_json

FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty")
logger = logging.getLogger("nanovllm.serve")


def generation_defaults(model: str, generation_config: str) -> dict[str, Any]:
    """What `model` says about sampling, as SamplingParams fields; nothing with `generation_config` "none"."""
    if generation_config == "none" or model.startswith("tiny:"):
        return {}
    try:
        path = resolve(model, progress=False)
        found = read_json(path / "generation_config.json", missing={}) if path.is_dir() else {}
        values = {name: found[name] for name in FIELDS if found.get(name) is not None}
        SamplingParams(**values)
    except NanoVLLMError as error:
        logger.warning("The model's generation_config.json is not used: %s", error)
        return {}
    return values
