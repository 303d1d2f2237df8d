"""The figures of a recorded run, and two runs side by side.

What it is: `summary`, the statistics of one replay as plain data, and `compare`, the same
of two with their ratios. What it knows nothing about: terminals, causes. Invariants: every
formula is `statistics.py`'s; times are in milliseconds under the run's own label; what is
undefined is None; runs of different models, or measured beside simulated, are not compared
unless that is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from nanovllm.core.events import BLOCK_CALLS
from nanovllm.core.timeline import Timeline
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.held_state import last_state, state_summary, used_blocks
from nanovllm.observe.paths import Replay, RequestPath
from nanovllm.observe.records import RunHeader
from nanovllm.observe.statistics import (
    distribution,
    integral,
    jitter_ns,
    meets,
    per_second,
    tail_ratio,
    tpot_ns,
)

COMPARED = {  # figure -> where it stands in a summary
    "TTFT p50": ("latency_ms", "ttft", "p50"),
    "TTFT p99": ("latency_ms", "ttft", "p99"),
    "TPOT p50": ("latency_ms", "tpot", "p50"),
    "TPOT p99": ("latency_ms", "tpot", "p99"),
    "T_queue p50": ("latency_ms", "queue", "p50"),
    "T_queue p99": ("latency_ms", "queue", "p99"),
    "E2E p50": ("latency_ms", "e2e", "p50"),
    "E2E p99": ("latency_ms", "e2e", "p99"),
    "jitter p50": ("latency_ms", "jitter", "p50"),
    "requests/s": ("throughput", "requests_per_s"),
    "output tokens/s": ("throughput", "output_tokens_per_s"),
    "goodput requests/s": ("goodput", "requests_per_s"),
    "preemptions": ("requests", "preemptions"),
    "live requests mean": ("state", "live_requests", "mean"),
    "live requests max": ("state", "live_requests", "max"),
    "used blocks mean": ("state", "used_blocks", "mean"),
    "used blocks max": ("state", "used_blocks", "max"),
    "cached blocks mean": ("state", "cached_blocks", "mean"),
    "sharing (estimated)": ("state", "sharing_factor", "mean"),
    "block-seconds/token": ("cost", "block_seconds_per_token"),
    "processor-seconds/token": ("cost", "processor_seconds_per_token"),
    "TTFT p99/p50": ("stability", "ttft_p99_over_p50"),
}
_RAN_AS = ("policy", "schedule_mode", "block_size", "num_blocks", "prefix_mode", "prior_state", "dtype")


def latencies_ns(timeline: Timeline) -> dict[str, float | None]:
    """What objectives are about. An answer of one token has no TPOT and cannot miss an objective on it."""
    tpot = tpot_ns(timeline.decode_gaps_ns)
    one_token = len(timeline.token_ns) == 1
    return {"ttft": timeline.ttft_ns, "tpot": 0.0 if one_token else tpot, "e2e": timeline.end_to_end_ns}


def request_row(path: RequestPath, header: RunHeader | None = None) -> dict[str, Any]:
    """One request as plain data: its terms in nanoseconds, lengths, end, the numbers of its records.

    With the run's `header` also what state it held.
    """
    gaps = path.timeline.decode_gaps_ns
    return {
        "request": path.name,
        "prompt_len": path.prompt_len,
        "cached_tokens": path.cached_tokens,
        "generated_len": path.generated_len,
        "end": path.end or "unfinished",
        **path.timeline.as_dict(),
        "tpot_ns": tpot_ns(gaps),
        "jitter_ns": jitter_ns(gaps),
        "state": last_state(path, header) if header else None,
        "held_ns": sum(span.length_ns for span in path.holds),
        "records": [event.seq for event in path.events],
    }


def summary(run: Replay, slo_ms: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Everything that is computed from one run. Latencies are those of completed requests."""
    recording, paths = run.recording, list(run.paths.values())
    done = [path for path in paths if path.end == "output_complete" and path.timeline.token_ns]
    duration_ns = recording.end_ns - recording.start_ns
    tokens = sum(len(path.timeline.token_ns) for path in done)
    return {
        "label": recording.label,
        "header": dict(recording.header.__dict__),
        "duration_s": round(duration_ns / 1e9, 6),
        "requests": _requests(paths),
        "tokens": {"prompt": sum(path.prompt_len for path in done), "output": tokens},
        "latency_ms": _latencies(done),
        "throughput": {
            "requests_per_s": per_second(len(done), duration_ns),
            "output_tokens_per_s": per_second(tokens, duration_ns),
        },
        "goodput": _goodput(done, slo_ms or {}, duration_ns),
        "state": state_summary(run),
        "cost": _cost(run, tokens),
        "stability": {
            "ttft_p99_over_p50": tail_ratio([path.timeline.ttft_ns or 0 for path in done]),
            "tpot_p99_over_p50": tail_ratio([tpot_ns(path.timeline.decode_gaps_ns) or 0 for path in done]),
        },
        "block_calls_ns": _block_calls(run),
        "remarks": recording.remarks,
    }


def compare(first: Mapping[str, Any], second: Mapping[str, Any], *, force: bool = False) -> dict[str, Any]:
    """Two summaries: each figure of both and the ratio second / first. Raises InvalidRequestError."""
    a, b = first["header"], second["header"]
    if not force and a["weights"] != b["weights"]:
        message = f"The runs are of different models: {a['model']} and {b['model']}."
        raise InvalidRequestError(message, param="file", hint="Say --force to compare them all the same.")
    if not force and a["label"] != b["label"]:
        message = f"One run is {a['label']}, the other {b['label']}."
        raise InvalidRequestError(message, param="file", hint="Say --force to compare them all the same.")
    return {
        "labels": [a["label"], b["label"]],
        "model": [a["model"], b["model"]],
        "commands": [a["command"], b["command"]],
        "differs": _differences(a, b),
        "requests": [first["requests"], second["requests"]],
        "figures": {name: _beside(_at(first, place), _at(second, place)) for name, place in COMPARED.items()},
        "remarks": [*_fairness(first, second), *first["remarks"], *second["remarks"]],
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What ran differently: settings, and each limit by itself."""
    settings = {name: [a[name], b[name]] for name in _RAN_AS}
    limits = {name: [a["knobs"].get(name), b["knobs"].get(name)] for name in (*a["knobs"], *b["knobs"])}
    return {name: pair for name, pair in (settings | limits).items() if pair[0] != pair[1]}


def _fairness(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What keeps the two runs from being comparable."""
    a, b = first["header"], second["header"]
    found = []
    if a["prior_state"] != b["prior_state"]:
        found.append(f"prior state: {a['prior_state']} in the first run, {b['prior_state']} in the second.")
    work = [(run["requests"]["sent"], run["tokens"]["prompt"], run["tokens"]["output"]) for run in (first, second)]
    if work[0] != work[1]:
        found.append("The runs did not complete the same requests: their workloads differ.")
    if (a["weights"], a["dtype"]) != (b["weights"], b["dtype"]):
        found.append("Weights or dtype differ: ratios say nothing about policies.")
    return found


def _requests(paths: list[RequestPath]) -> dict[str, Any]:
    ends = Counter(path.end or "unfinished" for path in paths)
    preemptions = sum(len(path.timeline.preempted_ns) for path in paths)
    return {"sent": len(paths), "ends": dict(sorted(ends.items())), "preemptions": preemptions}


def _latencies(done: list[RequestPath]) -> dict[str, Any]:
    times = [path.timeline for path in done]
    values: dict[str, list[float | None]] = {
        "ttft": [t.ttft_ns for t in times],
        "queue": [t.t_queue_ns for t in times],
        "prefill": [t.t_prefill_ns for t in times],
        "tpot": [tpot_ns(t.decode_gaps_ns) for t in times],
        "itl": [gap for t in times for gap in t.decode_gaps_ns],
        "jitter": [jitter_ns(t.decode_gaps_ns) for t in times],
        "e2e": [t.end_to_end_ns for t in times],
    }
    return {name: distribution([v for v in found if v is not None]) for name, found in values.items()}


def _goodput(done: list[RequestPath], slo_ms: Mapping[str, float], duration_ns: int) -> dict[str, Any] | None:
    if not slo_ms:
        return None
    good = sum(meets(latencies_ns(path.timeline), slo_ms) for path in done)
    return {"slo_ms": dict(slo_ms), "requests": good, "requests_per_s": per_second(good, duration_ns)}


def _cost(run: Replay, tokens: int) -> dict[str, float | None]:
    """Per output token of completed requests; processor time is the whole process's while it was recorded."""
    recording = run.recording
    block_s = integral(used_blocks(run), recording.start_ns, recording.end_ns) / 1e9
    processor_ns = recording.end.processor_ns if recording.end else 0
    return {
        "block_seconds_per_token": block_s / tokens if tokens else None,
        "processor_seconds_per_token": processor_ns / 1e9 / tokens if tokens and processor_ns else None,
    }


def _block_calls(run: Replay) -> dict[str, dict[str, float]] | None:
    """Nanoseconds per step in each block call; None where they were not measured."""
    found = [step.event.block_ns for step in run.steps if step.event.block_ns is not None]
    if not found:
        return None
    columns = zip(BLOCK_CALLS, zip(*found))
    return {name: {"mean_per_step": sum(ns) / len(ns), "total": sum(ns)} for name, ns in columns}


def _at(document: Mapping[str, Any], place: tuple[str, ...]) -> float | None:
    found: Any = document
    for name in place:
        found = None if found is None else found[name]
    return found


def _beside(a: float | None, b: float | None) -> dict[str, float | None]:
    return {"first": a, "second": b, "ratio": b / a if a and b is not None else None}
