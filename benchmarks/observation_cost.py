"""What observation costs: processor-seconds per token, everything on against off. The last line is JSON.

    python benchmarks/observation_cost.py                          # smollm2, 12 pairs of each kind, about ten minutes
    python benchmarks/observation_cost.py --parts probe            # one part alone
    python benchmarks/observation_cost.py --model tiny:random --pairs 2

On is what an operator or a lab can switch on together (`--parts` chooses):
    recording   every event, block events too, written to a JSONL file and flushed after each step
    probe       the prefix probe, blocks of 16 and 64, an infinite and a bounded cache each
    metrics     the Prometheus counters and histograms, fed after each step and at each end
    stopwatch   the time in each of the block manager's four calls
Off is none of them, and an event bus that keeps nothing, so that emitting events is in the figure too. The marks of a
request's timeline are set in both: outputs carry them.

Each pair serves the same requests (the `rag` workload, all at once, prefix reuse off) twice in one process, once on and
once off, in alternating order; between them comes a pair that is off on both sides, and shows what the machine does by
itself. The figure is the mean of the pairs' differences, in percent of the side that is off, and its upper one-sided
95 % bound (Student's t). Processor time counts all threads: waiting for a busy machine is not in it, but sharing
caches with one is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import at_least_one, told

from nanovllm import LLM
from nanovllm.core.events import BLOCK_CALLS, EventBus
from nanovllm.engine.block_log import BlockTimes
from nanovllm.engine.outputs import RequestOutput, StepOutput
from nanovllm.engine.run_header import run_header
from nanovllm.lab.workload_run import run_workload
from nanovllm.lab.workloads import Workload, generate
from nanovllm.observe.metrics import Ended, EngineMetrics, Reading
from nanovllm.observe.probe import PrefixProbe
from nanovllm.observe.recording_writer import JsonlWriter

AfterStep = Callable[[list[StepOutput]], None]
# One-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, that of the normal distribution
T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753, 1.746,
       1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697)  # fmt: skip


# -- what can be on --------------------------------------------------------------------------------


class SilentBus(EventBus):
    """Hears events and keeps none."""

    def _ignore(self, *args: object, **more: object) -> None:
        pass

    request = step = wait = block = _ignore


@contextmanager
def silent(llm: LLM) -> Iterator[None]:
    """Within it no event is made: the bus is shared by the engine's parts, so it changes its kind where it is."""
    bus = llm.engine.events
    bus.__class__ = SilentBus
    try:
        yield
    finally:
        bus.__class__ = EventBus


@contextmanager
def recording(llm: LLM) -> Iterator[AfterStep]:
    """As `--events FILE --events-blocks`."""
    header = run_header(llm.engine, llm.config, "benchmarks/observation_cost.py")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "events.jsonl"
        with JsonlWriter(llm.engine.events, path, header, blocks=True) as writer:
            yield lambda outputs: writer.pump()


@contextmanager
def probe(llm: LLM) -> Iterator[AfterStep]:
    """As a lab has it beside its engine."""
    shadow = PrefixProbe([16, 64], [None, 1024])
    llm.engine.observers.add(shadow)
    yield lambda outputs: None
    llm.engine.observers.remove(shadow)


@contextmanager
def metrics(llm: LLM) -> Iterator[AfterStep]:
    """As a server has them, and scraped once."""
    registry = EngineMetrics("nanovllm", "bench", lambda: reading(llm))

    def feed(outputs: list[StepOutput]) -> None:
        registry.stepped(reading(llm), sum(len(output.token_ids) for output in outputs))
        for output in outputs:
            if output.final is not None:
                registry.ended(ended(output.final))

    yield feed
    registry.render()


@contextmanager
def stopwatch(llm: LLM) -> Iterator[AfterStep]:
    """As `--time-blocks`."""
    engine, manager = llm.engine, llm.engine.scheduler.kv.block_manager
    engine.marks.block_times = BlockTimes(manager, engine.clock)
    yield lambda outputs: None
    engine.marks.block_times = None
    for name in BLOCK_CALLS:
        delattr(manager, name)  # the watch in front of the method


PARTS = {"recording": recording, "probe": probe, "metrics": metrics, "stopwatch": stopwatch}


def reading(llm: LLM) -> Reading:
    """The engine in numbers."""
    scheduler, marks = llm.engine.scheduler, llm.engine.marks
    return Reading(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        num_blocks=scheduler.kv.num_blocks,
        free_blocks=scheduler.kv.num_free_blocks,
        steps=marks.num_steps,
        preemptions=scheduler.num_preemptions,
        prefill_tokens=marks.num_prefill_tokens,
        decode_tokens=marks.num_decode_tokens,
    )


def ended(final: RequestOutput) -> Ended:
    """A finished request in plain values."""
    t = final.timeline
    return Ended(
        reason=final.finish_reason or "abort",
        prompt_tokens=final.prompt_len,
        completion_tokens=len(final.token_ids),
        longest_answer=len(final.token_ids),
        queue_ns=t.t_queue_ns,
        prefill_ns=t.t_prefill_ns,
        ttft_ns=t.ttft_ns,
        decode_ns=sum(t.decode_gaps_ns),
        end_to_end_ns=t.end_to_end_ns,
        gaps_ns=t.decode_gaps_ns,
    )


# -- measuring -------------------------------------------------------------------------------------


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=at_least_one, default=12, help="of each kind; at least 2")
    parser.add_argument("--sessions", type=at_least_one, default=8, help="requests a run")
    parser.add_argument("--output-len", type=at_least_one, default=64)
    parser.add_argument("--threads", type=at_least_one, default=1)
    report = measure(parser.parse_args())
    for side, value in report["processor_us_per_token"].items():
        print(f"{side:<4} {value:>10.2f} processor-us per token, median")
    print(
        f"on ({', '.join(report['settings']['parts'])}): {report['overhead_percent']:+.2f} %, "
        f"upper 95 % bound {report['overhead_upper95_percent']:+.2f} %\n"
        f"off twice: {report['same_arm_percent']:+.2f} %, upper 95 % bound {report['same_arm_upper95_percent']:+.2f} % "
        f"({report['settings']['pairs']} pairs each, measured)"
    )
    print(json.dumps(report))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of pairs, interleaved."""
    workload = generate("rag", sessions=args.sessions, output_len=args.output_len)
    with LLM(args.model, prefix_mode="off", max_model_len=2048, num_threads=args.threads, progress=False) as llm:
        cost(llm, workload, args.parts)  # warm: memory, packed weights
        pairs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number in range(args.pairs):
            for is_on in (True, False):
                print(f"pair {number + 1}, {'on and off' if is_on else 'off twice'} ...", file=sys.stderr)
                parts = args.parts if is_on else []
                pairs[is_on].append(pair(llm, workload, parts, is_turned=number % 2 == 1))
    overhead, upper = difference(pairs[True])
    same, same_upper = difference(pairs[False])
    return {
        "label": "measured",
        "overhead_percent": round(overhead, 3),
        "overhead_upper95_percent": round(upper, 3),
        "same_arm_percent": round(same, 3),
        "same_arm_upper95_percent": round(same_upper, 3),
        "processor_us_per_token": {
            "on": round(1e6 * statistics.median(a for a, _ in pairs[True]), 2),
            "off": round(1e6 * statistics.median(b for both in pairs.values() for _, b in both), 2),
        },
        "pairs": {"on_off": pairs[True], "off_off": pairs[False]},
        "settings": vars(args) | {"cores": os.cpu_count()},
    }


def pair(llm: LLM, workload: Workload, parts: list[str], is_turned: bool) -> tuple[float, float]:
    """(the side with `parts` on, the side with none), one after the other."""
    if is_turned:
        off = cost(llm, workload, [])
        return cost(llm, workload, parts), off
    return cost(llm, workload, parts), cost(llm, workload, [])


def cost(llm: LLM, workload: Workload, parts: list[str]) -> float:
    """Processor-seconds per token of one run, prompt and output tokens together; opening and closing files counts."""
    start = time.process_time()
    with ExitStack() as stack:
        hooks = [stack.enter_context(PARTS[name](llm)) for name in parts]
        if not parts:
            stack.enter_context(silent(llm))
        run = run_workload(llm.engine, workload, after_step=partial(call_all, hooks))
    seconds = time.process_time() - start
    if len(run.finals) != len(workload.requests):
        raise SystemExit(f"only {len(run.finals)} of {len(workload.requests)} requests were served")
    return seconds / num_tokens(workload)


def call_all(hooks: list[AfterStep], outputs: list[StepOutput]) -> None:
    """Each hook with what a step handed over."""
    for hook in hooks:
        hook(outputs)


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
    told(main)
