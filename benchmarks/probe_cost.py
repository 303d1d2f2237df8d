"""What the prefix probe costs: processor-seconds per token with and without it, in pairs. The last line is JSON.

    python benchmarks/probe_cost.py                          # smollm2, 12 pairs, some minutes
    python benchmarks/probe_cost.py --model tiny:random --pairs 8

Each pair serves the same requests (the `rag` workload, all at once, prefix reuse off) twice in one process, once with
the probe and once without, in alternating order; a second kind of pair has no probe on either side, and shows what the
machine does by itself. The figure is the mean of the pairs' differences, in percent of the side without, and its upper
one-sided 95 % bound (Student's t). Processor time counts all threads: waiting for a busy machine is not in it, but
sharing caches with one is. `inside_percent`
is the processor time within the probe's own calls over all of it: far less noisy, but blind to what the calls
disturb. The probe looks at blocks of 16 and 64, with an infinite and a bounded cache each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM
from nanovllm.core.observer import RequestObserver
from nanovllm.lab.workload_run import run_workload
from nanovllm.lab.workloads import Workload, generate
from nanovllm.observe.probe import PrefixProbe

# One-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, that of the normal distribution
T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753, 1.746,
       1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697)  # fmt: skip


class Timed:
    """The probe, with the processor time spent in it. The clock's own cost counts as the probe's."""

    def __init__(self) -> None:
        self.probe, self.seconds = PrefixProbe([16, 64], [None, 1024]), 0.0

    def entered(self, token_ids: Sequence[int], namespace: str, root: bytes) -> None:
        """As the probe's."""
        start = time.thread_time()
        self.probe.entered(token_ids, namespace, root)
        self.seconds += time.thread_time() - start

    def finished(self, token_ids: Sequence[int], namespace: str, root: bytes) -> None:
        """As the probe's."""
        start = time.thread_time()
        self.probe.finished(token_ids, namespace, root)
        self.seconds += time.thread_time() - start


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=12, help="of each kind; at least 2")
    parser.add_argument("--sessions", type=int, default=16, help="requests a run")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    report = measure(args)
    print(f"{'processor-us per token':<24}{'median':>10}")
    for side, value in report["processor_us_per_token"].items():
        print(f"{side:<24}{value:>10}")
    print(
        f"the probe: {report['overhead_percent']:+.2f} %, 95 % bound {report['overhead_upper95_percent']:+.2f} %\n"
        f"same arm twice: {report['same_arm_percent']:+.2f} %, upper {report['same_arm_upper95_percent']:+.2f} %\n"
        f"inside the probe's calls alone: {report['inside_percent']:.3f} % ({args.pairs} pairs each, measured)"
    )
    print(json.dumps(report))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of pairs, interleaved."""
    workload = generate("rag", sessions=args.sessions, output_len=16)
    with LLM(args.model, prefix_mode="off", max_model_len=2048, num_threads=args.threads, progress=False) as llm:
        cost(llm, workload)  # warm: memory, packed weights
        timed = Timed()
        inside = cost(llm, workload, timed)
        shares = timed.seconds / (inside * num_tokens(workload))
        pairs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number in range(args.pairs):
            for probed in (True, False):
                print(f"pair {number + 1}, {'with and without' if probed else 'without twice'} ...", file=sys.stderr)
                pairs[probed].append(pair(llm, workload, probed, is_turned=number % 2 == 1))
    overhead, upper = difference(pairs[True])
    same, same_upper = difference(pairs[False])
    return {
        "label": "measured",
        "inside_percent": round(100 * shares, 4),
        "overhead_percent": round(overhead, 3),
        "overhead_upper95_percent": round(upper, 3),
        "same_arm_percent": round(same, 3),
        "same_arm_upper95_percent": round(same_upper, 3),
        "processor_us_per_token": {
            "with": round(1e6 * statistics.median(a for a, _ in pairs[True]), 2),
            "without": round(1e6 * statistics.median(b for both in pairs.values() for _, b in both), 2),
        },
        "pairs": {"with_without": pairs[True], "without_without": pairs[False]},
        "settings": vars(args) | {"cores": os.cpu_count()},
    }


def pair(llm: LLM, workload: Workload, probed: bool, is_turned: bool) -> tuple[float, float]:
    """(the side that may be probed, the side that never is), one after the other."""
    probe = PrefixProbe([16, 64], [None, 1024]) if probed else None
    if is_turned:
        plain = cost(llm, workload)
        return cost(llm, workload, probe), plain
    return cost(llm, workload, probe), cost(llm, workload)


def cost(llm: LLM, workload: Workload, observer: RequestObserver | None = None) -> float:
    """Processor-seconds per token of one run, prompt and output tokens together."""
    if observer is not None:
        llm.engine.observers.add(observer)
    start = time.process_time()
    run = run_workload(llm.engine, workload)
    seconds = time.process_time() - start
    if observer is not None:
        llm.engine.observers.remove(observer)
    if len(run.finals) != len(workload.requests):
        raise SystemExit(f"only {len(run.finals)} of {len(workload.requests)} requests were served")
    return seconds / num_tokens(workload)


def num_tokens(workload: Workload) -> int:
    """All that are computed or generated."""
    return sum(workload.prompt_lens().values()) + sum(request.output_len for request in workload.requests)


def difference(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of the pairs' differences in percent of the second side, and its upper 95 % bound."""
    percent = [100 * (a / b - 1) for a, b in pairs]
    freedom = len(percent) - 1
    quantile = T95[freedom - 1] if freedom <= len(T95) else 1.645
    mean = statistics.fmean(percent)
    return mean, mean + quantile * statistics.stdev(percent) / len(percent) ** 0.5


if __name__ == "__main__":
    main()
