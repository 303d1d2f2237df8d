"""One thread, two or three: the same tokens and the same bits of log-probabilities, in both types of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact_harness import run
from golden_prompts import PROMPTS

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.model

LONG = 210  # tokens: each of three threads takes blocks of rows of its own
NUM_TOKENS = 4


def results(path: Path, dtype: str, num_threads: int) -> list[Any]:
    """Six requests at once: a long prompt and short ones, greedy and drawn, then decoded together."""
    torch.set_num_threads(num_threads)  # an engine's own setting belongs to the process, once
    with LLM(str(path), dtype=dtype, kv_memory="128MiB", prefix_mode="off", progress=False) as llm:
        runner: Any = llm.engine.runner
        assert runner.model.whole is None or runner.model.whole._team.threads == num_threads
        shorts = [llm.tokenizer.encode(PROMPTS[name][0]) for name in ("poem", "chinese", "python", "sql", "mixed")]
        long = [token for _ in range(LONG) for token in shorts[0]][:LONG]
        params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=NUM_TOKENS, logprobs=3) for i in range(6)]
        outputs = run(llm, [long, *shorts], params)
    return [(output.token_ids, output.completions[0].logprobs) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("torch_threads")
def test_the_number_of_threads_changes_no_bit(smollm2_path: Path, dtype: str) -> None:
    alone = results(smollm2_path, dtype, 1)
    assert [len(tokens) for tokens, _ in alone] == [NUM_TOKENS] * 6
    assert results(smollm2_path, dtype, 2) == alone
    assert results(smollm2_path, dtype, 3) == alone
