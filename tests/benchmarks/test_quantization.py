"""The measure of int8's loss: its reordered model is the same function, and its scores are those of the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantization
import torch
from peers import weights

from nanovllm import SamplingParams
from nanovllm.models.loading import tiny_config
from tests.models.model_files import write_gguf

IDS = [[7 * i % 250 for i in range(24)], [11 * i % 250 for i in range(24)]]


def arm(home: Path, **settings: str) -> quantization.Arm:
    return quantization.Arm("x", {"model": str(home), "dtype": "float32", **settings})


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_reordered_model_is_the_same_function(tmp_path: Path, architecture: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_config(architecture))
    home = weights.exported(str(tmp_path / "tiny.gguf"), tmp_path)[0]
    found = []
    for place in (home, quantization.shuffled(home)):
        with quantization.opened(arm(place), 25) as llm:
            found.append(quantization.score(llm.engine.runner, IDS, 24))
    torch.testing.assert_close(torch.cat(found[0].losses), torch.cat(found[1].losses), rtol=1e-3, atol=1e-3)
    assert found[0].agreement(found[1]) == 1 and found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-3)


def test_scores_are_those_the_engine_would_sample_from(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_config("llama"))
    with quantization.opened(arm(tmp_path / "tiny.gguf"), 32) as llm:
        found = [quantization.score(llm.engine.runner, IDS, rows) for rows in (24, 4)]
        greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=0, ignore_eos=True)
        answers = llm.generate([IDS[0][:n] for n in (1, 5, 23)], greedy)
    assert len(torch.cat(found[0].losses)) == 2 * 23
    torch.testing.assert_close(torch.cat(found[0].losses), torch.cat(found[1].losses), rtol=1e-4, atol=1e-4)
    assert [answer.token_ids[0] for answer in answers] == [int(torch.cat(found[0].tops)[n - 1]) for n in (1, 5, 23)]
