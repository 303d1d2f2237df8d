"""What serving costs: the server's token rate over the offline engine's, in one run. The last line is JSON.

    python benchmarks/server_overhead.py               # 32 streams, three repeats, smollm2, bf16, 2 threads
    python benchmarks/server_overhead.py --engine-process

Both answer the same prompts (token ids, 256 in 128 out, greedy, the end token ignored, prefix reuse off), one after
the other, in alternating order; each in a process of its own. The rate is output tokens over the time from the first
request to the last byte. The client stores raw bytes and parses after the run; its processor time is reported, for it
shares the machine. Event-loop lag is read from the server's own /metrics, of the measured runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from command import at_least_one, told
from served import Exchange, exchange, get, percentile, post, server

IN_TOKENS, OUT_TOKENS = 256, 128
LAG = "loop_lag_seconds_bucket"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=at_least_one, default=32)
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--threads", type=at_least_one, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--engine-process", action="store_true", help="the server's engine in a process of its own")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)  # the child that runs LLM.generate
    args = parser.parse_args()
    if args.offline:
        run_offline(args)
        return
    report = measure(args)
    print(f"{'':<12}{'output tok/s':>14}")
    print(f"{'offline':<12}{report['offline_tok_s']:>14}\n{'server':<12}{report['server_tok_s']:>14}")
    print(f"ratio {report['ratio']}; event-loop lag P99 at most {report['loop_lag_p99_ms']} ms")
    print(json.dumps(report))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of both rates, their ratio, and what else was seen."""
    offline_rates, server_runs = [], []
    with Offline(args) as offline, server(*flags(args)) as port:
        offline.rate(-1)
        serve_once(port, args, -1)
        before = lag_buckets(get(port, "/metrics"))
        for repeat in range(args.repeats):
            order = ("offline", "server") if repeat % 2 == 0 else ("server", "offline")
            for side in order:
                print(f"repeat {repeat + 1}, {side} ...", file=sys.stderr)
                if side == "offline":
                    offline_rates.append(offline.rate(repeat))
                else:
                    server_runs.append(serve_once(port, args, repeat))
        after = lag_buckets(get(port, "/metrics"))
    mine = statistics.median(run["tok_s"] for run in server_runs)
    other = statistics.median(offline_rates)
    return {
        "label": "measured",
        "offline_tok_s": round(other, 1),
        "server_tok_s": round(mine, 1),
        "ratio": round(mine / other, 3),
        "loop_lag_p99_ms": lag_quantile_ms(before, after, 0.99),
        "runs": {"offline": offline_rates, "server": server_runs},
        "settings": {key: value for key, value in vars(args).items() if key != "offline"},
    }


def flags(args: argparse.Namespace) -> list[str]:
    """The server's settings, those of the offline engine."""
    chosen = [
        "--prefix-mode",
        "off",
        "--max-model-len",
        "2048",
        "--num-threads",
        str(args.threads),
        "--dtype",
        "bfloat16",
    ]
    return [args.model, *chosen, *(["--engine-process"] if args.engine_process else [])]


def prompts(count: int, repeat: int) -> list[list[int]]:
    """The same for both sides."""
    rng = random.Random(repeat)
    return [[rng.randrange(1000, 40000) for _ in range(IN_TOKENS)] for _ in range(count)]


def serve_once(port: int, args: argparse.Namespace, repeat: int) -> dict[str, float]:
    """One run of all streams over HTTP."""
    bodies = [
        {"prompt": ids, "max_tokens": OUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
         "stream_options": {"include_usage": True}}
        for ids in prompts(args.streams, repeat)
    ]  # fmt: skip
    answers, busy_s = exchange(port, [post("/v1/completions", body) for body in bodies])
    made = sum(map(output_tokens, answers))
    if made != OUT_TOKENS * args.streams:
        raise SystemExit(f"the server made {made} tokens: {answers[0].status} {answers[0].data[:300]!r}")
    seconds = max(a.pieces[-1][0] for a in answers) - min(a.sent_s for a in answers)
    first_s = [a.pieces[0][0] - a.sent_s for a in answers]
    return {
        "tok_s": made / seconds,
        "ttft_p50_s": round(percentile(first_s, 0.5), 3),
        "client_processor_share": round(busy_s / seconds, 4),
    }


def output_tokens(answer: Exchange) -> int:
    """What the usage chunk of a stream says."""
    for line in answer.data.splitlines():
        if line.startswith(b"data: {") and b'"completion_tokens"' in line:
            return json.loads(line[6:])["usage"]["completion_tokens"]
    return 0


class Offline:
    """`LLM.generate` in a process of its own: a repeat's number goes in, a rate comes out."""

    def __init__(self, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--offline", "--model", args.model]
        command += ["--streams", str(args.streams), "--threads", str(args.threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def rate(self, repeat: int) -> float:
        """Output tokens per second."""
        assert self._process.stdin and self._process.stdout
        print(repeat, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def __enter__(self) -> Offline:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("", timeout=60)


def run_offline(args: argparse.Namespace) -> None:
    """The child: settings as the server's."""
    from nanovllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=OUT_TOKENS, ignore_eos=True)
    settings = {"prefix_mode": "off", "max_model_len": 2048, "num_threads": args.threads, "dtype": "bfloat16"}
    with LLM(args.model, **settings) as llm:
        for line in sys.stdin:
            start_s = time.perf_counter()
            outputs = llm.generate(prompts(args.streams, int(line)), params)
            print(sum(len(out.token_ids) for out in outputs) / (time.perf_counter() - start_s), flush=True)


def lag_buckets(page: str) -> dict[float, float]:
    """Upper edge in seconds -> how many lags were at most that."""
    lines = [line for line in page.splitlines() if LAG in line and not line.startswith("#")]
    return {float(line.split('le="')[1].split('"')[0]): float(line.rsplit(" ", 1)[1]) for line in lines}


def lag_quantile_ms(before: dict[float, float], after: dict[float, float], share: float) -> float:
    """Upper edge of the bucket that holds the quantile of the lags between two pages, milliseconds."""
    counts = {edge: after[edge] - before.get(edge, 0.0) for edge in sorted(after)}
    total = max(counts.values(), default=0.0)
    if not total:
        raise SystemExit("the server measured no event-loop lag")
    return round(1000 * next(edge for edge, count in counts.items() if count >= share * total), 3)


if __name__ == "__main__":
    told(main)
