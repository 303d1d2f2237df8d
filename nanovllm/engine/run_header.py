"""The header of a recording, read off a running engine.

What it is: one function that says what ran: model, state, policy and limits. What it
knows nothing about: files. Invariant: it changes nothing and holds no prompt.
"""

from __future__ import annotations

from nanovllm import __version__
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.policy import SchedulingPolicy
from nanovllm.observe.records import RunHeader


def run_header(engine: LLMEngine, config: EngineConfig, command: str) -> RunHeader:
    """What `engine`, made from `config`, is about to run. Call it before the first request that is recorded.

    A simulated engine has no tensors: its blocks have 0 bytes.
    """
    parts, scheduler, tier = engine.parts, engine.scheduler, engine.parts.device_tier
    kv = scheduler.kv
    is_cold = kv.num_cached_blocks == 0 and kv.num_free_blocks == kv.num_blocks
    return RunHeader(
        label=parts.label,
        model=config.model,
        weights=str(parts.identity.get("weights", "")),
        dtype=str(parts.identity.get("dtype", "none")).removeprefix("torch."),
        policy=config.policy,
        schedule_mode=config.schedule_mode,
        block_size=scheduler.block_size,
        num_blocks=kv.num_blocks,
        block_bytes=tier.block_bytes if tier else 0,
        prefix_mode=config.prefix_mode,
        prior_state="cold" if is_cold else "warm",
        seed=config.seed,
        version=__version__,
        command=command,
        knobs=knobs_of(scheduler.policy, scheduler.watermark_blocks),
    )


def knobs_of(policy: SchedulingPolicy, watermark_blocks: int) -> dict[str, int]:
    """The limits of a step and of admission; 0 where there is none."""
    return {
        "max_num_seqs": policy.max_num_seqs,
        "max_num_batched_tokens": policy.max_num_batched_tokens,
        "max_new_requests_per_step": policy.max_new_requests_per_step or 0,
        "prefill_during_decode": int(policy.prefill_during_decode),
        "max_prefill_chunk": policy.max_prefill_chunk or 0,
        "max_prefill_beside_decode": policy.max_prefill_beside_decode or 0,
        "watermark_blocks": watermark_blocks,
    }
