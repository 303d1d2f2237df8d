"""An engine without a model: the real scheduler and blocks, a cost table for time, a virtual clock.

What it is: wiring, as `engine.build` does it for real models. What it knows nothing
about: workloads. Invariants: two runs of one workload are equal to the nanosecond on any machine; every
figure from it is labelled `simulated`; reuse is off unless asked for: labs observe first.
"""

from __future__ import annotations

from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.core.clock import VirtualClock
from nanovllm.core.cost_table import CostTable
from nanovllm.core.events import EventBus
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.intake import Intake
from nanovllm.engine.kv_state import DeviceState
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.parts import EngineParts
from nanovllm.engine.policy import SchedulingPolicy
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.simulated_runner import SimulatedRunner
from nanovllm.models.byte_tokenizer import ByteTokenizer

LABEL = "simulated"
DEFAULT_MODE = "observe"


def default_costs() -> CostTable:
    """The order of a small model on two laptop cores: 10 ms a step, 0.3 ms a prompt token at short context."""
    return CostTable(base_ms=10.0, per_new_ms=0.3, per_pair_ms=0.0001)


def simulated_engine(num_blocks: int, *, costs: CostTable | None = None, **settings: Any) -> LLMEngine:
    """An engine of `num_blocks` blocks. `settings` are those of EngineConfig. Raises ConfigError."""
    config = EngineConfig.from_kwargs(
        "tiny:random", **{"prefix_mode": DEFAULT_MODE, "num_blocks": num_blocks, **settings}
    )
    clock, tokenizer = VirtualClock(), ByteTokenizer()
    events = EventBus(clock, config.event_capacity)
    blocks = BlockManager(num_blocks, config.block_size, config.prefix_mode, events=events)
    scheduler = Scheduler(
        SchedulingPolicy.from_config(config),
        DeviceState(blocks),
        clock,
        events,
        block_size=config.block_size,
        watermark_blocks=int(config.watermark * num_blocks),
    )
    limit = min(config.max_model_len or 2**31, num_blocks * config.block_size)
    return LLMEngine(
        EngineParts(
            runner=SimulatedRunner(costs or default_costs(), clock),
            scheduler=scheduler,
            intake=Intake(tokenizer, tokenizer.vocab_size, limit),
            tokenizer=tokenizer,
            clock=clock,
            events=events,
            seed=config.seed,
            identity={"weights": "simulated"},
            label=LABEL,
        )
    )
