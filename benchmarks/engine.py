"""The engine against transformers on the default model, in one run. The last line of stdout is one JSON document.

    python benchmarks/engine.py                      # both workloads, three repeats, bf16, 2 threads
    python benchmarks/engine.py --repeats 1 --dtype float32

Workloads, greedy, the end token ignored, the same token ids and the same weights for both:
    one_stream     1 x (128 in, 128 out): our decode against transformers' eager `generate`
    concurrent_32  32 x (256 in, 128 out): our continuous batching against `generate_batch`

Order alternates between repeats; figures are medians; every figure is `measured`.
What it does not cover: vLLM and llama.cpp, which need environments of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
from nanovllm.models.loading import load_model_files

Tokens = list[list[int]]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=at_least_one, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=at_least_one, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = measure(args.model, args.dtype, args.repeats)
    report["machine"] = {"processor": processor(), "threads": args.threads, "torch": torch.__version__}
    report["settings"] = {"dtype": args.dtype, "model": args.model, "repeats": args.repeats}
    print_table(report)
    print(json.dumps(report))


def measure(model: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Median output tokens/s of both engines on both workloads, and their ratio."""
    rng = random.Random(0)
    one = [[rng.randrange(1000, 40000) for _ in range(128)]]
    many = [[rng.randrange(1000, 40000) for _ in range(256)] for _ in range(32)]
    ours = Ours(model, dtype)
    theirs = Transformers(model, dtype)
    runs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "one_stream": (lambda: ours.decode_rate(one, 128), lambda: theirs.decode_rate(one, 128)),
        "concurrent_32": (lambda: ours.output_rate(many, 128), lambda: theirs.batch_rate(many, 128)),
    }
    report: dict[str, Any] = {"label": "measured", "workloads": {}}
    for name, pair in runs.items():
        rates: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats):
            for side in (0, 1) if repeat % 2 == 0 else (1, 0):
                print(f"{name}, repeat {repeat + 1}, {('nanovllm', 'transformers')[side]} ...", file=sys.stderr)
                rates[side].append(pair[side]())
        mine, other = statistics.median(rates[0]), statistics.median(rates[1])
        report["workloads"][name] = {
            "nanovllm_tok_s": round(mine, 2),
            "transformers_tok_s": round(other, 2),
            "ratio": round(mine / other, 3),
            "runs": {"nanovllm": rates[0], "transformers": rates[1]},
        }
    return report


class Ours:
    """This engine, one configuration for all workloads. Prefix reuse is off: repeats must not profit from it."""

    def __init__(self, model: str, dtype: str) -> None:
        self.llm = LLM(model, dtype=dtype, prefix_mode="off", max_model_len=2048)
        self.output_rate([[1000] * 16] * 4, 8)

    def output_rate(self, prompts: Tokens, count: int) -> float:
        """Output tokens per second from the first arrival to the last token."""
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        return sum(len(out.token_ids) for out in outputs) / (time.perf_counter() - start)

    def decode_rate(self, prompts: Tokens, count: int) -> float:
        """Decoded tokens per second: the prefill and the first token are left out."""
        out = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))[0]
        return (count - 1) / (sum(out.timeline.decode_gaps_ns) / 1e9)


class Transformers:
    """The peer, with the weights that our loader read from the same file."""

    def __init__(self, model: str, dtype: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        files = load_model_files(model)
        c = files.config
        config = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tie_word_embeddings,
            max_position_embeddings=c.max_position_embeddings, eos_token_id=None,
        )  # fmt: skip
        weights = {name: files.weights.get(name).clone() for name in files.weights.names()}
        self.model = transformers.LlamaForCausalLM(config).eval()
        self.model.load_state_dict(weights, strict=not c.tie_word_embeddings)
        self.model.tie_weights()
        self.model.to(getattr(torch, dtype))
        self.generation = transformers.GenerationConfig

    @torch.inference_mode()
    def decode_rate(self, prompts: Tokens, count: int) -> float:
        """Decoded tokens per second by `generate`, the prefill left out: the time of `count` less that of 1."""
        ids = torch.tensor(prompts)
        times = []
        for tokens in (1, count):
            start = time.perf_counter()
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            times.append(time.perf_counter() - start)
        return (count - 1) / (times[1] - times[0])

    def batch_rate(self, prompts: Tokens, count: int) -> float:
        """Output tokens per second of transformers' own continuous batching."""
        generation = self.generation(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        outputs = self.model.generate_batch(prompts, generation_config=generation)
        seconds = time.perf_counter() - start
        made = sum(len(out.generated_tokens) for out in outputs.values())
        if made != count * len(prompts):
            raise SystemExit(f"transformers made {made} tokens instead of {count * len(prompts)}: not comparable")
        return made / seconds


def processor() -> str:
    """The processor's name and what of it matters here."""
    name = platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def print_table(report: dict[str, Any]) -> None:
    """What a person reads."""
    print(f"{'workload':<16}{'nanovllm tok/s':>16}{'transformers tok/s':>20}{'ratio':>8}")
    for name, row in report["workloads"].items():
        print(f"{name:<16}{row['nanovllm_tok_s']:>16}{row['transformers_tok_s']:>20}{row['ratio']:>8}")


if __name__ == "__main__":
    told(main)
