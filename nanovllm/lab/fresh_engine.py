"""A fresh engine around a runner that is there already: cold state, another pool, no second model.

What it is: wiring, for labs that need many runs that cannot touch each other. What it knows
nothing about: workloads. Invariants: block manager, scheduler, bus and forecasts are new,
so a run finds no state of an earlier one; the pool has `num_blocks` blocks, of those that the tier has.
"""

from __future__ import annotations

from dataclasses import replace

from nanovllm.config import EngineConfig
from nanovllm.core.events import EventBus
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.intake import Intake
from nanovllm.engine.kv_state import DeviceState
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.policy import SchedulingPolicy
from nanovllm.engine.scheduler import Scheduler


def fresh_engine(engine: LLMEngine, config: EngineConfig, num_blocks: int) -> LLMEngine:
    """An engine on `engine`'s runner, tokenizer and clock, with `num_blocks` blocks that nobody has used.

    Use one of them at a time: they write into the same memory.
    """
    parts, tier = engine.parts, engine.parts.device_tier
    assert tier is None or num_blocks <= len(tier.pool)
    events = EventBus(parts.clock, config.event_capacity)
    blocks = BlockManager(num_blocks, config.block_size, config.prefix_mode, events=events)
    scheduler = Scheduler(
        SchedulingPolicy.from_config(config),
        DeviceState(blocks),
        parts.clock,
        events,
        block_size=config.block_size,
        watermark_blocks=int(config.watermark * num_blocks),
    )
    limit = min(parts.intake.max_model_len, num_blocks * config.block_size)
    intake = Intake(parts.tokenizer, parts.intake.vocab_size, limit)
    return LLMEngine(replace(parts, scheduler=scheduler, events=events, intake=intake))
