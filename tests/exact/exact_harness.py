"""Driving an engine step by step, and looking at what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine import build
from nanovllm.engine.exec_batch import ExecBatch
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence as EngineSequence

NEAR_TIE = 1e-3
MAX_STEPS = 20_000
Hook = Callable[[LLMEngine, int], None]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def sharing_model(llm: LLM, **settings: Any) -> LLM:
    """Another LLM with other settings over the same weights: they are neither read nor packed again."""
    runner: Any = llm.engine.runner
    model = runner.model
    with patch.dict(build.ARCHITECTURES, {model.config.architecture: lambda *_: model}):
        return LLM(**{**vars(llm.config), **settings}, progress=False)


def limit(llm: LLM, **knobs: Any) -> None:
    """Change the scheduling policy of an idle engine."""
    assert llm.engine.is_finished()
    llm.engine.scheduler.policy = replace(llm.engine.scheduler.policy, **knobs)


def run(
    llm: LLM,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    *,
    between: Hook | None = None,
    salt: str = "",
) -> list[Any]:
    """Outputs in the order of `prompts`; `between(engine, step)` is called after each step."""
    engine = llm.engine
    ids = [engine.add_request(p, s, cache_salt=salt) for p, s in zip(prompts, params, strict=True)]
    done: dict[str, Any] = {}
    for step in range(MAX_STEPS):
        if len(done) == len(ids):
            return [done[request_id] for request_id in ids]
        done |= {out.request_id: out.final for out in engine.step() if out.final}
        if between is not None:
            between(engine, step)
    raise AssertionError(f"no end after {MAX_STEPS} steps")


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def preempt_at(chosen: int) -> Hook:
    """Take the blocks of everybody who runs, once."""

    def between(engine: LLMEngine, step: int) -> None:
        if step == chosen:
            for seq in list(engine.scheduler.running):
                engine.scheduler.preempt(seq)

    return between


def preempt_each_token() -> Hook:
    """Take the blocks of a sequence after its first chunk, and after each token it gains.

    Twice without a gain would be for ever: it would never end.
    """
    last_preempted: dict[EngineSequence, int] = {}

    def between(engine: LLMEngine, step: int) -> None:
        for seq in list(engine.scheduler.running):
            if last_preempted.get(seq) != seq.num_tokens:
                last_preempted[seq] = seq.num_tokens
                engine.scheduler.preempt(seq)

    return between


@torch.inference_mode()
def prompt_logits(llm: LLM, token_ids: list[int], chunk: int | None = None) -> torch.Tensor:
    """Logits [L, vocab] after each prompt token, over a pool of its own, computed in chunks."""
    runner: Any = llm.engine.runner
    model, tier_pool = runner.model, runner.tier.pool
    size = tier_pool.shape[4]
    seq = EngineSequence(token_ids, SamplingParams(), size)
    seq.block_table = list(reversed(range(seq.num_blocks)))
    pool = torch.zeros((seq.num_blocks, *tier_pool.shape[1:]), dtype=tier_pool.dtype)
    rows = []
    while seq.num_remaining_tokens:
        seq.num_scheduled_tokens = min(chunk or seq.num_tokens, seq.num_remaining_tokens)
        batch = ExecBatch.build([seq])
        layout = runner.layout(batch)
        plan = model.kernels.plan(layout, pool, model.geometry)
        every = torch.arange(seq.num_scheduled_tokens)
        rows.append(model.forward(torch.from_numpy(batch.token_ids), layout.positions, plan, every))
        seq.num_cached_tokens += seq.num_scheduled_tokens
    return torch.cat(rows).float()


def divergence(ours: list[int], golden: list[int]) -> int | None:
    """The first step at which two outputs differ."""
    assert len(ours) == len(golden)
    return next((i for i, pair in enumerate(zip(ours, golden, strict=True)) if pair[0] != pair[1]), None)


def check_against_golden(ours: dict[str, list[int]], goldens: dict[str, Any]) -> str:
    """Every token equal, or different where the reference's own margin is under NEAR_TIE; the tally is returned."""
    flips = []
    for name, token_ids in ours.items():
        golden = goldens[name]
        step = divergence(token_ids, golden["output_ids"])
        if step is not None:
            assert golden["margins"][step] < NEAR_TIE, f"{name}: token {step} differs from transformers'"
            flips.append(f"{name} at {step}, {len(token_ids) - step} tokens not compared")
    margins = [margin for name in ours for margin in goldens[name]["margins"]]
    close = sum(margin < NEAR_TIE for margin in margins)
    return (
        f"{len(ours)} prompts, {len(margins)} tokens; reference margins: smallest {min(margins):.5f}, "
        f"{close} under {NEAR_TIE}; differing at such a near-tie (not equal): {flips or 'none'}"
    )
