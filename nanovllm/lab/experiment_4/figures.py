"""The figures of one recorded run of experiment 4.

What it is: what `observe/` says about one recording, picked for this experiment, and two
things of its own: the size of each request's state, and that estimate held against what the
block pool counted. What it knows nothing about: cases, arms, other runs. Invariants: every latency is
`observe/statistics.py`'s; a request's state is counted from its lengths, `blocks = ceil(tokens / block_size)`, and
`estimate_error_blocks` is how far the sum of these ever was from the pool's own count.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from nanovllm.core.events import RequestEvent, StepEvent
from nanovllm.observe.paths import Replay
from nanovllm.observe.run_summary import summary

POOL_WAITS = ("blocks", "headroom")
TOKEN_STAGES = ("first_token", "decode_step")
GONE = ("preempted", "state_released", "output_complete", "aborted", "failed")


def run_figures(run: Replay) -> dict[str, Any]:
    """Everything the tables need of one run, as plain data."""
    found, header = summary(run), run.recording.header
    latency = found["latency_ms"]
    state = found["state"]
    return {
        "label": found["label"],
        "num_blocks": header.num_blocks,
        "requests": found["requests"]["sent"],
        "completed": found["requests"]["ends"].get("output_complete", 0),
        "preemptions": found["requests"]["preemptions"],
        "prompt_len": sorted({path.prompt_len for path in run.paths.values()}),
        "state_sizes": _state_sizes(run),
        "live_requests": state["live_requests"],
        "prefilling_requests": state["prefilling_requests"],
        "used_blocks": state["used_blocks"],
        "estimate_error_blocks": estimate_error(run),
        "ttft_ms": _middle_and_tail(latency["ttft"]),
        "queue_ms": _middle_and_tail(latency["queue"]),
        "prefill_ms": _middle_and_tail(latency["prefill"]),
        "pool_waits": sum(wait.reason in POOL_WAITS for _, wait in run.waits),
        "other_waits": dict(sorted(Counter(w.reason for _, w in run.waits if w.reason not in POOL_WAITS).items())),
    }


def request_terms(run: Replay) -> dict[str, dict[str, int]]:
    """The terms of each completed request, nanoseconds."""
    times = {path.request_id: path.timeline for path in run.paths.values() if path.timeline.token_ns}
    return {
        name: {"T_queue": t.t_queue_ns or 0, "T_prefill": t.t_prefill_ns or 0, "TTFT": t.ttft_ns or 0}
        for name, t in times.items()
    }


def _middle_and_tail(distribution: dict[str, Any]) -> dict[str, float | None]:
    return {"p50": distribution["p50"], "p99": distribution["p99"]}


def _state_sizes(run: Replay) -> list[dict[str, int]]:
    """One row for each pair of lengths: what such a request holds in its last step, both ways of counting."""
    header = run.recording.header
    pairs = Counter((path.prompt_len, path.generated_len) for path in run.paths.values())
    rows = []
    for (prompt_len, generated_len), count in sorted(pairs.items()):
        tokens = prompt_len + max(generated_len - 1, 0)  # the last sampled token never has KV
        blocks = -(-tokens // header.block_size)
        exact = tokens * header.block_bytes // header.block_size
        rows.append(
            {
                "prompt_len": prompt_len,
                "requests": count,
                "tokens": tokens,
                "blocks": blocks,
                "block_exact_bytes": blocks * header.block_bytes,
                "token_exact_bytes": exact,
                "bound_bytes": blocks * header.block_bytes - exact,
            }
        )
    return rows


def estimate_error(run: Replay) -> int:
    """Largest difference, over all steps, between blocks estimated from lengths and blocks the pool counted."""
    header, known, worst = run.recording.header, dict[str, int](), 0
    for event in run.recording.events:
        if isinstance(event, StepEvent):
            estimated = sum(-(-tokens // header.block_size) for tokens in known.values())
            worst = max(worst, abs(estimated - (header.num_blocks - event.free_blocks)))
        elif isinstance(event, RequestEvent):
            if event.stage in GONE:
                known.pop(event.request_id, None)
            elif event.stage == "scheduled" or event.request_id in known:
                is_sampled = event.stage in TOKEN_STAGES  # told before the new token is counted
                known[event.request_id] = event.prompt_len + event.generated_len + is_sampled
    return worst
