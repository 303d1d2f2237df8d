"""From an `EngineConfig` to a running engine: the one place that puts real parts together.

What it is: loading, sizing, wiring. What it knows nothing about: requests. What it
decides (dtype, pool size, max_model_len) it logs with its arithmetic.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from nanovllm.config import EngineConfig
from nanovllm.core.clock import MonotonicClock
from nanovllm.core.events import EventBus
from nanovllm.engine.block_log import BlockTimes, log_calls
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.build_state import build_state
from nanovllm.engine.device_tier import DeviceTier, PoolSize, size_pool
from nanovllm.engine.intake import Intake
from nanovllm.engine.integrity import check_blocks
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.parts import EngineParts
from nanovllm.engine.policy import SchedulingPolicy
from nanovllm.engine.prefault import prefaulting
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import OutOfMemoryError
from nanovllm.kernels.interface import Kernels
from nanovllm.kernels.selection import choose_device, choose_dtype, choose_kernels, set_threads
from nanovllm.models.loading import LoadedModel, load_model_files
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.quantised import QuantisedWeights, in_eight_bits
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.models.weights import WeightSource
from nanovllm.state.tiers.ownership import check_takeable

logger = logging.getLogger("nanovllm")

SAMPLE = "model.layers.0.mlp.down_proj.weight"  # stands for all linears where their groups' bits are asked for
ROOM_TOKENS = 4096  # of the largest step, whose scratch is made ready at the start; a larger one takes it when it comes


def build_engine(config: EngineConfig, *, progress: bool = True) -> LLMEngine:
    """Load the model and assemble its engine. Raises the errors of models, config and memory."""
    if config.state_dir is not None:
        check_takeable(Path(config.state_dir))
    set_threads(config.num_threads)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    loaded = load_model_files(config.model, progress=progress, seed=config.seed)
    if config.quantization is not None:
        loaded = in_eight_bits(loaded)
    fingerprint = loaded.weights.fingerprint()
    runner, size = _build_runner(config, loaded, device, dtype)
    max_model_len = _max_model_len(config, loaded.config, size)
    clock = MonotonicClock()
    events = EventBus(clock, config.event_capacity)
    blocks = BlockManager(size.num_blocks, config.block_size, config.prefix_mode, events=events)
    identity: dict[str, object] = {"weights": fingerprint, "dtype": str(dtype), "model": asdict(loaded.config)}
    state = build_state(config, blocks, runner.tier, identity, clock)
    scheduler = Scheduler(
        SchedulingPolicy.from_config(config),
        state,
        clock,
        events,
        block_size=config.block_size,
        watermark_blocks=int(config.watermark * size.num_blocks),
    )
    parts = EngineParts(
        runner=runner,
        scheduler=scheduler,
        tokenizer=loaded.tokenizer,
        clock=clock,
        events=events,
        intake=Intake(loaded.tokenizer, loaded.config.vocab_size, max_model_len),
        seed=config.seed,
        eos_token_ids=loaded.config.eos_token_ids,
        identity=identity,
        device_tier=runner.tier,
        state=state,
    )
    engine = LLMEngine(parts)
    engine.marks.costs = state.costs
    log_calls(blocks, config.logged_block_calls)
    if config.time_blocks:
        engine.marks.block_times = BlockTimes(blocks, clock)
    if config.check_invariants:
        engine.driver.after_step.append(lambda: check_blocks(blocks, scheduler.live()))
    return engine


def _build_runner(
    config: EngineConfig, loaded: LoadedModel, device: torch.device, dtype: torch.dtype
) -> tuple[ModelRunner, PoolSize]:
    """The pool is sized first, by what the weights will leave, and made ready while they are loaded."""
    try:
        kernels = choose_kernels(config.kernels, device)
        size = _size_pool(config, loaded, dtype, _free_beside_weights(config, loaded, kernels, dtype, device))
        tier = DeviceTier(size, dtype, device)
        with torch.inference_mode(), prefaulting(tier.pool):
            model = ARCHITECTURES[loaded.config.architecture](loaded.config, loaded.weights, kernels, dtype, device)
            if model.whole is not None:
                model.whole.reserve(min(config.max_num_batched_tokens, ROOM_TOKENS))
    finally:
        loaded.weights.close()
    logger.info("%s; prefix_mode %s; kernels %s", size, config.prefix_mode, kernels.name)
    _log_quantization(loaded.weights, kernels, dtype)
    return ModelRunner(model, tier, device), size


def _size_pool(config: EngineConfig, loaded: LoadedModel, dtype: torch.dtype, free_bytes: int) -> PoolSize:
    useful = config.max_num_seqs * min(config.max_model_len or 2**62, loaded.config.max_position_embeddings)
    return size_pool(
        loaded.config,
        config.block_size,
        dtype.itemsize,
        budget_bytes=config.kv_memory_bytes,
        num_blocks=config.num_blocks,
        free_bytes=free_bytes,
        useful_tokens=useful,
    )


def free_memory(device: torch.device, gpu_share: float = 1.0) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(total * (1 - gpu_share)))
    return psutil.virtual_memory().available


def _free_beside_weights(
    config: EngineConfig, loaded: LoadedModel, kernels: Kernels, dtype: torch.dtype, device: torch.device
) -> int:
    """What a pool may take. Raises OutOfMemoryError where not even the weights find room."""
    need, free = weight_bytes(loaded, kernels, dtype), free_memory(device)
    if need > free:
        raise OutOfMemoryError(
            f"The weights need {need:,} bytes (estimated) as {dtype}; {free:,} are free.",
            param="model",
            hint="Use dtype='bfloat16', a smaller model, or a machine with more memory.",
        )
    return max(0, free_memory(device, config.gpu_memory_utilization) - need)


def weight_bytes(loaded: LoadedModel, kernels: Kernels, dtype: torch.dtype) -> int:
    """What a model's weights will take, estimated: lookups, linears as the kernels lay them out, groups beside them."""
    config = loaded.config
    count, lookup = config.parameter_count(), config.vocab_size * config.hidden_size
    linears = count if config.tie_word_embeddings else count - lookup  # the head among them
    copies = kernels.copies_of_weights(dtype)
    groups = loaded.weights.grouped(SAMPLE) if kernels.reads_groups(dtype) else None
    held = lookup + copies * linears if copies else count
    return held * dtype.itemsize + (0 if groups is None else int(linears * groups.bytes_per_weight))


def _log_quantization(weights: WeightSource, kernels: Kernels, dtype: torch.dtype) -> None:
    """Say what `--quantization` did, and where it saves nothing."""
    if not isinstance(weights, QuantisedWeights):
        return
    logger.info("quantization int8: %s", weights)
    if not kernels.reads_groups(dtype):
        logger.warning(
            "quantization int8 makes nothing faster here: kernels %s in %s compute with the weights restored. "
            "It needs kernels compiled in bfloat16, with AVX512-BF16.",
            kernels.name,
            dtype,
        )


def _max_model_len(config: EngineConfig, model: ModelConfig, size: PoolSize) -> int:
    """The longest request: what was asked for, lowered to what the model and an otherwise empty pool can hold."""
    wanted = config.max_model_len or model.max_position_embeddings
    limit = min(wanted, model.max_position_embeddings, size.num_blocks * config.block_size)
    if limit < wanted:
        logger.warning(
            "max_model_len is lowered from %d to %d tokens: the model reaches %d, the KV pool holds %d.",
            wanted,
            limit,
            model.max_position_embeddings,
            size.num_blocks * config.block_size,
        )
    return limit
