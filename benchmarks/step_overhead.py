"""What the engine's own Python costs a decode step. The last line of stdout is one JSON document.

    python benchmarks/step_overhead.py                       # 64 and 256 sequences, default model, bf16, 2 threads
    python benchmarks/step_overhead.py --sequences 64 --steps 50

Own time is the engine thread's processor time in `LLMEngine.step` outside the two calls that compute: the decoder with
the step's forward pass, and the sampler. It is scheduling, building arrays, planning attention, appending,
detokenising, handing over; where the forward pass is no single call (`--kernels` other than compiled) it is all of
the runner that is left out. It is set against the wall time of the shortest
step: steps that a busy machine stretched would make the share look small. Every figure is `measured`.
"""

from __future__ import annotations

import argparse
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
from command import at_least_one, told

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.matrix_unit_linear import MatrixUnitLinear

PROMPT_TOKENS, WARM_STEPS, SLACK = 64, 3, 64  # the first decode while the last are prefilled


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=at_least_one, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--sequences", type=at_least_one, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=at_least_one, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(args.model, args.dtype, count, args.steps) for count in args.sequences]
    print(f"{'sequences':>9}{'own ms':>9}{'sampler ms':>12}{'step ms':>9}{'own share':>11}")
    for row in rows:
        figures = f"{row['own_ms']:>9}{row['sampler_ms']:>12}{row['step_ms']:>9}{row['own_share']:>11.1%}"
        print(f"{row['sequences']:>9}{figures}")
    largest = max(row["own_share"] for row in rows)
    print(json.dumps({"label": "measured", "largest_own_share": largest, "settings": vars(args), "rows": rows}))


def measure(model: str, dtype: str, count: int, steps: int) -> dict[str, Any]:
    """Median own and sampling time and the shortest of `steps` decode steps, `count` sequences at temperature 0.6."""
    rng = random.Random(0)
    length = PROMPT_TOKENS + WARM_STEPS + steps + SLACK
    with LLM(model, dtype=dtype, max_num_seqs=count, max_model_len=length, prefix_mode="off") as llm:
        engine = llm.engine
        inside, sampling = Stopwatch(), Stopwatch()
        runner: Any = engine.runner
        if runner.model.whole is None or isinstance(runner.model.head, MatrixUnitLinear):
            runner.launch = inside.around(runner.launch)
        else:
            runner.model.whole = TimedDecoder(runner.model.whole, inside)
        runner.sampler.sample = sampling.around(runner.sampler.sample)
        params = SamplingParams(temperature=0.6, max_tokens=length, ignore_eos=True)
        for _ in range(count):
            engine.add_request([rng.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)], params)
        while len(engine.scheduler.running) < count or any(seq.is_prefilling for seq in engine.scheduler.running):
            engine.step()
        own, samples, walls = [], [], []
        for _ in range(WARM_STEPS + steps):
            inside.seconds = sampling.seconds = 0.0
            wall, busy = time.perf_counter(), time.thread_time()
            if len(engine.step()) != count:
                raise SystemExit("a step did not run all sequences: not comparable")
            own.append(time.thread_time() - busy - inside.seconds - sampling.seconds)
            walls.append(time.perf_counter() - wall)
            samples.append(sampling.seconds)
    own_s, step_s = statistics.median(own[WARM_STEPS:]), min(walls[WARM_STEPS:])
    return {
        "sequences": count,
        "own_ms": round(own_s * 1e3, 2),
        "sampler_ms": round(statistics.median(samples[WARM_STEPS:]) * 1e3, 2),
        "step_ms": round(step_s * 1e3, 1),
        "own_share": round(own_s / step_s, 4),
    }


class Stopwatch:
    """Processor seconds of this thread spent inside what it was put around."""

    seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed."""

        def timed(*args: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*args)
            finally:
                self.seconds += time.thread_time() - start

        return timed


class TimedDecoder:
    """A decoder in one call, timed; all else of it as it is."""

    def __init__(self, whole: Any, watch: Stopwatch) -> None:
        self._whole, self._call = whole, watch.around(whole)

    def __call__(self, *args: Any) -> Any:
        """The step."""
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


if __name__ == "__main__":
    told(main)
