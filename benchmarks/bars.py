"""Every promised figure beside its bar: the command, what it printed, met or missed.

    make bars                       # all of them; some minutes, and nothing else may run meanwhile
    python benchmarks/bars.py --issue 2

A bar reads one figure from the JSON document that its command prints as its last line.
Exit code 1 if a bar is missed or its command failed: a bar is never assumed.
"""

from __future__ import annotations

import argparse
import json
import operator
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMPARE = {">=": operator.ge, "<=": operator.le}
TIMEOUT_S, PATIENCE_S = 3600, 60


@dataclass(frozen=True)
class Bar:
    """`figure` is a dotted path into the command's JSON, or `seconds` for its wall time."""

    issue: int
    what: str
    command: str
    figure: str
    compare: str
    bar: float


ENGINE = "python benchmarks/engine.py"
OVERHEAD = "python benchmarks/server_overhead.py"
REJECTIONS = "python benchmarks/rejections.py"
CACHE = (
    "python -m nanovllm lab cache benchmarks/traces/mooncake_conversation_trace.jsonl.gz "
    "--policy pgdsf --capacity 10000 --requests 10000 --json"
)
KNOWLEDGE = "python benchmarks/knowledge.py"
SESSIONS = "python benchmarks/sessions.py"
RESTORE = "python benchmarks/state_restore.py"
OBSERVED = "python benchmarks/observation_cost.py"
ROOFLINE = "python benchmarks/roofline.py"
STEP = "python benchmarks/step_overhead.py"
COMPARED = "python benchmarks/peers.py --peers"  # one command per peer, so that each stays within TIMEOUT_S
TTFT, STREAMS = "ttft_128,ttft_1024,ttft_2048,warm_ttft_2048", "one_stream,concurrent_8,concurrent_32,concurrent_64"
VLLM = f"{COMPARED} vllm --only {STREAMS},{TTFT},decode_gap,start_up"
SAME_BITS = f"{COMPARED} vllm --only one_stream --ours export"  # bf16 weights for both
LLAMA_CPP = f"{COMPARED} llama_cpp --only one_stream"
TRANSFORMERS = f"{COMPARED} transformers --only concurrent_32"
CAPPED = f"{COMPARED} transformers --only capped_one_stream,capped_concurrent_32"
LATE_TTFT = "rows.decode_gap.median.nanovllm.ttft_over_solo"
BARS = (
    Bar(2, "one stream, decode, against transformers eager", ENGINE, "workloads.one_stream.ratio", ">=", 1.5),
    Bar(2, "32 concurrent, against transformers generate_batch", ENGINE, "workloads.concurrent_32.ratio", ">=", 4.0),
    Bar(2, "make test of everything so far, seconds", "make test", "seconds", "<=", 600.0),
    Bar(3, "32 streams, the server's token rate over the offline engine's", OVERHEAD, "ratio", ">=", 0.85),
    Bar(3, "32 streams, event-loop lag P99, ms", OVERHEAD, "loop_lag_p99_ms", "<=", 50.0),
    Bar(3, "1,000 arrivals in a second, P99 of a refusal, ms", REJECTIONS, "refusal_p99_ms", "<=", 100.0),
    Bar(4, "one stream, output tokens/s, against vLLM", VLLM, "rows.one_stream.ratio.vllm", ">=", 2.5),
    Bar(4, "one stream, bf16 weights for both, against vLLM", SAME_BITS, "rows.one_stream.ratio.vllm", ">=", 2.5),
    Bar(4, "one stream, output tokens/s, against llama.cpp", LLAMA_CPP, "rows.one_stream.ratio.llama_cpp", ">=", 1.2),
    Bar(4, "32 concurrent, output tokens/s, against vLLM", VLLM, "rows.concurrent_32.ratio.vllm", ">=", 1.5),
    Bar(4, "64 concurrent, output tokens/s, against vLLM", VLLM, "rows.concurrent_64.ratio.vllm", ">=", 1.25),
    Bar(4, "32 concurrent, against transformers", TRANSFORMERS, "rows.concurrent_32.ratio.transformers", ">=", 6.0),
    Bar(4, "cold TTFT of 1,024 tokens, against vLLM", VLLM, "rows.ttft_1024.ratio.vllm", ">=", 1.2),
    Bar(4, "cold TTFT of 2,048 tokens, against vLLM", VLLM, "rows.ttft_2048.ratio.vllm", ">=", 1.2),
    Bar(4, "warm-prefix TTFT of 2,048 tokens, against vLLM", VLLM, "rows.warm_ttft_2048.ratio.vllm", ">=", 5.0),
    Bar(4, "longest decode gap, against vLLM", VLLM, "rows.decode_gap.ratio.vllm", ">=", 2.0),
    Bar(4, "TTFT of the prompt that makes the gap, over its solo time", VLLM, LATE_TTFT, "<=", 1.3),
    Bar(4, "start-up to first token, against vLLM", VLLM, "rows.start_up.ratio.vllm", ">=", 10.0),
    Bar(4, "decode step over its floor, one stream", ROOFLINE, "streams.1.ratio", "<=", 1.6),
    Bar(4, "decode step over its floor, 32 streams", ROOFLINE, "streams.32.ratio", "<=", 1.6),
    Bar(4, "capped, one stream, transformers", CAPPED, "rows.capped_one_stream.ratio.transformers", ">=", 1.5),
    Bar(4, "capped, 32 concurrent, transformers", CAPPED, "rows.capped_concurrent_32.ratio.transformers", ">=", 1.5),
    Bar(4, "own Python of a step, 64 and 256 sequences, share", STEP, "largest_own_share", "<=", 0.05),
    Bar(
        5, "observation on, processor-s per token, upper 95 % bound, %", OBSERVED, "overhead_upper95_percent", "<=", 3.0
    ),
    Bar(
        6, "500 documents, Zipf(1.0), median TTFT without reuse over tiers", KNOWLEDGE, "none_over_tiers_p50", ">=", 2.5
    ),
    Bar(
        6, "500 documents, median TTFT with device-only reuse over tiers", KNOWLEDGE, "device_over_tiers_p50", ">=", 1.0
    ),
    Bar(
        6, "500 documents, mean TTFT with device-only reuse over tiers", KNOWLEDGE, "device_over_tiers_mean", ">=", 1.0
    ),
    Bar(6, "20 turns, kill -9 after each: answers as unkilled", SESSIONS, "turns_equal", ">=", 20),
    Bar(6, "20 turns, from turn 5 on: reusable tokens that come from disk", SESSIONS, "disk_share_min", ">=", 0.9),
    Bar(
        6, "turns of 2,048 tokens and more: cold TTFT over restored, pages warm", SESSIONS, "cold_over_warm", ">=", 5.0
    ),
    Bar(
        6, "turns of 2,048 tokens and more: cold over restored, pages dropped", SESSIONS, "cold_over_dropped", ">=", 5.0
    ),
    Bar(6, "prefix of 2,048 tokens: cold TTFT over disk, pages warm", RESTORE, "speedup.disk_warm", ">=", 5.0),
    Bar(6, "cache simulator, one policy, one capacity, 10,000 requests, seconds", CACHE, "seconds", "<=", 10.0),
)


def main() -> int:
    """Run each command once and print one line per bar; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--issue", type=int, help="only the bars of this issue")
    args = parser.parse_args()
    bars = [bar for bar in BARS if args.issue in (None, bar.issue)]
    reports = {command: run(command) for command in dict.fromkeys(bar.command for bar in bars)}
    rows = [judge(bar, reports[bar.command]) for bar in bars]
    print(f"{'issue':<6}{'figure':>10}  {'bar':>10}  {'':<8}what (command)")
    for row in rows:
        numbers = f"{row['issue']:<6}{row['figure']!s:>10}  {row['bar']:>10}"
        print(f"{numbers}  {row['verdict']:<8}{row['what']} ({row['command']})")
    print(json.dumps({"label": "measured", "bars": rows}))
    return 0 if all(row["verdict"] == "met" for row in rows) else 1


def run(command: str) -> dict[str, Any]:
    """The command's JSON document and wall time; `error` where it has none."""
    print(f"running: {command}", file=sys.stderr)
    words = shlex.split(command)
    words[0] = sys.executable if words[0] == "python" else words[0]
    start = time.monotonic()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            said, errors = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            end(child)
            return {"error": f"no answer in {TIMEOUT_S} s"}
    seconds = time.monotonic() - start
    if child.returncode != 0:
        return {"error": f"exit code {child.returncode}: {errors[-300:]}"}
    last = (said.strip().splitlines() or [""])[-1]
    document = json.loads(last) if last.startswith("{") else {}
    return {**document, "seconds": round(seconds, 1)}


def end(child: subprocess.Popen[str]) -> None:
    """Asked first, so that it ends what it started: the next command must not share the cores with that."""
    child.terminate()
    try:
        child.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def judge(bar: Bar, report: dict[str, Any]) -> dict[str, Any]:
    """One row: the figure as printed, and whether it meets the bar."""
    figure: Any = report
    for key in bar.figure.split("."):
        figure = figure.get(key) if isinstance(figure, dict) else None
    met = isinstance(figure, int | float) and COMPARE[bar.compare](figure, bar.bar)
    return {
        "issue": bar.issue, "what": bar.what, "command": bar.command, "bar": f"{bar.compare} {bar.bar:g}",
        "figure": report.get("error", figure), "verdict": "met" if met else "missed",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
