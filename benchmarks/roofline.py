"""A decode step over its floor: what the machine would take for the linears and the KV alone. The last line is JSON.

    python benchmarks/roofline.py                        # 1 and 32 streams, default model, bf16, 2 threads
    python benchmarks/roofline.py --streams 1 --context 1024

The floor of a step of n sequences is the time of all its linears, in the model's order and over its distinct weights
(so that no cache serves one layer's weight twice), by the fastest path of those measured here, plus its KV bytes over
the read bandwidth measured here:

    torch      F.linear on the weight as it is
    packed     oneDNN on the weight packed once, exactly n rows
    ours       what the engine itself calls, from whichever form of the weight it keeps

The fastest of the three makes the floor. A linear of ours that is slower than another path raises the ratio, and so
does a faster one, until the rest of the step has followed. Where ours is the fastest its time is part of step and floor
alike, up to that of the next path, which `paths_ms` shows. Where a step is one call in C, `ours` calls the same
functions in the same threads with arguments made beforehand: what Python adds is a microsecond a linear.
Paths and steps are measured in turn; figures are medians, and `measured`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from command import at_least_one, told

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.grouped_linear import FEW, GroupedLinear
from nanovllm.kernels.interface import Linear
from nanovllm.kernels.matrix_unit_linear import MatrixUnitLinear
from nanovllm.models.loading import load_model_files
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weights import WeightSource

STACKED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)), ("mlp", ("gate_proj", "up_proj")))
BANDWIDTH_BYTES, BANDWIDTH_TRIES = 2**29, 10
WARM_STEPS, SLACK, PAUSE_S = 5, 64, 0.03
Pass = Callable[[], object]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=at_least_one, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--streams", type=at_least_one, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=at_least_one, default=256, help="prompt tokens of each stream")
    parser.add_argument("--repeats", type=at_least_one, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    rows = {str(count): measure(args, count, bandwidth) for count in args.streams}
    print(f"{'streams':>7}{'step ms':>9}{'floor ms':>10}{'ratio':>7}   floor of")
    for count, row in rows.items():
        parts = f"linears {row['linears_ms']} by {row['fastest']}, KV {row['kv_ms']}"
        print(f"{count:>7}{row['step_ms']:>9}{row['floor_ms']:>10}{row['ratio']:>7}   {parts}")
    settings = {"model": args.model, "dtype": args.dtype, "threads": args.threads, "context": args.context}
    settings["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    figures = {"bandwidth_gb_s": round(bandwidth / 1e9, 2), "streams": rows}
    print(json.dumps({"label": "measured", **figures, "settings": settings}))


def measure(args: argparse.Namespace, count: int, bandwidth: float) -> dict[str, Any]:
    """One number of streams: the step, each linear path, and the ratio of the step to the floor."""
    dtype, length = getattr(torch, args.dtype), args.context + WARM_STEPS + args.repeats + SLACK
    with LLM(args.model, dtype=args.dtype, max_num_seqs=count, max_model_len=length, prefix_mode="off") as llm:
        step = decoding(llm, count, args.context, length)
        runner: Any = llm.engine.runner
        model = runner.model
        paths = linear_paths(args.model, model.config, dtype, count)
        inputs = [torch.randn(count, width).to(dtype) for width in widths(model.config)]
        passes: dict[str, Pass] = {name: linears(path, inputs) for name, path in paths.items()}
        passes["ours"] = own_linears(model, inputs)
        times = in_turn({"step": step, **passes}, args.repeats)
        contexts = sum(seq.num_tokens for seq in llm.engine.scheduler.running) - count * args.repeats // 2
        kv_bytes = contexts * token_bytes(model.config, dtype)
    fastest = min(passes, key=lambda name: times[name])
    kv_s = kv_bytes / bandwidth
    floor_s = times[fastest] + kv_s
    return {
        "step_ms": round(times["step"] * 1e3, 2),
        "floor_ms": round(floor_s * 1e3, 2),
        "ratio": round(times["step"] / floor_s, 3),
        "fastest": fastest,
        "linears_ms": round(times[fastest] * 1e3, 2),
        "kv_ms": round(kv_s * 1e3, 2),
        "paths_ms": {name: round(times[name] * 1e3, 2) for name in passes},
    }


def decoding(llm: LLM, count: int, context: int, length: int) -> Callable[[], object]:
    """An engine in which `count` sequences decode; a call is one step of all of them."""
    rng, engine = random.Random(0), llm.engine
    runner: Any = engine.runner
    ordinary = runner.model.config.vocab_size // 2
    params = SamplingParams(temperature=0, max_tokens=length - context, ignore_eos=True)
    for _ in range(count):
        engine.add_request([rng.randrange(ordinary) for _ in range(context)], params)
    while len(engine.scheduler.running) < count or any(seq.is_prefilling for seq in engine.scheduler.running):
        engine.step()

    def step() -> None:
        if len(engine.step()) != count:
            raise SystemExit("a step did not run all sequences: not comparable")

    return step


def linear_paths(model: str, config: ModelConfig, dtype: torch.dtype, rows: int) -> dict[str, list[Linear]]:
    """torch's own and oneDNN's packed, in the model's order, each over weights of its own."""
    files = load_model_files(model)
    try:
        weights = [weight.to(dtype) for weight in in_order(files.weights, config)]
    finally:
        files.weights.close()
    paths: dict[str, list[Linear]] = {"torch": [lambda x, weight=weight: F.linear(x, weight) for weight in weights]}
    if dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        paths["packed"] = [packed(weight, rows) for weight in weights]
    return paths


def in_order(source: WeightSource, config: ModelConfig) -> list[torch.Tensor]:
    """Every weight of a step as the engine stacks them: layer by layer, the head last."""
    weights = []
    for i in range(config.num_layers):
        for part, names in (*STACKED, ("mlp", ("down_proj",))):
            weights.append(torch.cat([source.get(f"model.layers.{i}.{part}.{name}.weight") for name in names]))
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return [*weights, source.get(head).clone()]


def packed(weight: torch.Tensor, rows: int) -> Linear:
    """oneDNN's product for `rows` rows, its weight laid out once."""
    ours = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, ours, None, "none", [], "")


def widths(config: ModelConfig) -> list[int]:
    """The width of the input of each linear, in the model's order."""
    layer = [config.hidden_size, config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size]
    return layer * config.num_layers + [config.hidden_size]


def linears(path: list[Linear], inputs: list[torch.Tensor]) -> Pass:
    """All linears of a step, one after the other."""

    @torch.inference_mode()
    def run() -> None:
        for linear, x in zip(path, inputs, strict=True):
            linear(x)

    return run


def own_linears(model: Any, inputs: list[torch.Tensor]) -> Pass:
    """The engine's own, in its team's threads where a step is one call."""
    path = [linear for layer in model.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    path.append(model.head)
    if model.whole is None or isinstance(model.head, MatrixUnitLinear):
        return linears(path, inputs)
    team = model.whole._team
    parallel = ctypes.cast(team.library.team_parallel, ctypes.c_void_p)
    results = [linear(x) for linear, x in zip(path, inputs, strict=True)]
    calls = [(*bare_call(*each, team.library), each) for each in zip(path, inputs, results, strict=True)]

    def run() -> None:
        team.library.team_call(team.address)
        for function, args, _ in calls:  # the last part keeps alive what `args` points to
            function(args, parallel, team.threads)
        team.library.team_dismiss(team.address)

    return run


def bare_call(linear: Any, x: torch.Tensor, y: torch.Tensor, library: ctypes.CDLL) -> tuple[Any, Any]:
    """The function in C that computes y from x, and its argument."""
    if isinstance(linear, GroupedLinear) and len(x) > FEW:
        linear = linear.many
    function = library.grouped_linear if isinstance(linear, GroupedLinear) else library.panel_linear
    return function, ctypes.byref(linear.args(x.data_ptr(), y.data_ptr(), len(x)))


def in_turn(passes: dict[str, Pass], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turn so that a disturbance meets all of them.

    A pause stands before each: torch's idle threads wait in a loop for a while, on the processors of whoever is next.
    """
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(WARM_STEPS + repeats):
        for name, run in passes.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            run()
            if repeat >= WARM_STEPS:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """KV bytes of a token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def read_bandwidth() -> float:
    """Bytes per second of the best of several sums over memory that no cache holds."""
    best = 0.0
    for dtype in (torch.float32, torch.int64):
        values = torch.ones(BANDWIDTH_BYTES // dtype.itemsize, dtype=dtype)
        for _ in range(BANDWIDTH_TRIES):
            start = time.perf_counter()
            values.sum()
            best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    told(main)
