"""The figures of a load run, from its outcomes: pure functions.

What it is: percentiles, rates, goodput, and the document that holds them. What it
knows nothing about: HTTP, clocks, tables. Invariants: completed + rejected + failed is
all that was sent; latencies are those of completed requests, and each says how many
values it stands on; a percentile is a value that occurred (nearest rank).

    duration            = t(last request ended) - t(first request sent)
    request throughput  = completed / duration
    output throughput   = sum of N_out of completed / duration
    total throughput    = (sum of prompt tokens + sum of N_out of completed) / duration
    goodput             = completed requests that meet every objective / duration
                          (as in DistServe, OSDI 2024, and `vllm bench serve --goodput`)
TTFT, TPOT, ITL and E2E are defined in `outcome.py`. An answer of one token has no TPOT and cannot miss an
objective on it; an answer without any text has no TTFT and misses every objective on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.lab.outcome import Outcome
from nanovllm.observe.statistics import distribution
from nanovllm.observe.statistics import meets as meets_objectives

LATE_MS, BUSY_SHARE = 10.0, 0.8  # beyond either, the client is what was measured


def report(
    outcomes: Sequence[Outcome], slo_ms: Mapping[str, float], *, wall_ns: int = 0, cpu_ns: int = 0
) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    completed = [outcome for outcome in outcomes if outcome.verdict == "completed"]
    duration_s = _duration_s(outcomes)
    figures: dict[str, Any] = {
        "requests": counts(outcomes),
        "duration_s": round(duration_s, 6),
        "tokens": tokens(completed),
        "throughput": throughput(completed, duration_s),
        "latency_ms": latencies(completed),
        "goodput": goodput(completed, slo_ms, duration_s),
        "client": client(outcomes, wall_ns, cpu_ns),
    }
    return {**figures, "remarks": remarks(figures)}


def counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many of each verdict, and why. `text_chunks_of_failed` is what failed streams had shown."""
    reasons = {
        verdict: dict(sorted(Counter(o.reason for o in outcomes if o.verdict == verdict).items()))
        for verdict in ("completed", "rejected", "failed")
    }
    return {
        "sent": len(outcomes),
        **{verdict: sum(found.values()) for verdict, found in reasons.items()},
        "finish_reasons": reasons["completed"],
        "rejected_by_status": reasons["rejected"],
        "failed_by_reason": reasons["failed"],
        "text_chunks_of_failed": sum(len(o.text_ns) for o in outcomes if o.verdict == "failed"),
    }


def tokens(completed: Sequence[Outcome]) -> dict[str, Any]:
    """Sums over completed requests. `without_usage`: answers whose tokens had to be counted as chunks."""
    return {
        "prompt": sum(o.usage.prompt_tokens or 0 for o in completed),
        "cached": sum(o.usage.cached_tokens or 0 for o in completed),
        "output": sum(o.output_tokens for o in completed),
        "text_chunks": sum(len(o.text_ns) for o in completed),
        "chunks_in_one_read": sum(gap == 0 for o in completed for gap in o.gaps_ns),
        "without_usage": sum(o.usage.completion_tokens is None for o in completed),
        "without_text": sum(not o.text_ns for o in completed),
    }


def throughput(completed: Sequence[Outcome], duration_s: float) -> dict[str, float]:
    """Rates over the whole run."""
    found = tokens(completed)
    return {
        "requests_per_s": _rate(len(completed), duration_s),
        "output_tokens_per_s": _rate(found["output"], duration_s),
        "total_tokens_per_s": _rate(found["prompt"] + found["output"], duration_s),
    }


def latencies(completed: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Each latency's distribution, in milliseconds. ITL is over all gaps of all requests."""
    return {
        "ttft": distribution([o.ttft_ns for o in completed if o.ttft_ns is not None]),
        "tpot": distribution([o.tpot_ns for o in completed if o.tpot_ns is not None]),
        "itl": distribution([gap for o in completed for gap in o.gaps_ns]),
        "e2e": distribution([o.e2e_ns for o in completed if o.e2e_ns is not None]),
    }


def goodput(completed: Sequence[Outcome], slo_ms: Mapping[str, float], duration_s: float) -> dict[str, Any] | None:
    """Requests that met all objectives, and how many a second; None where there are no objectives."""
    if not slo_ms:
        return None
    good = sum(meets(outcome, slo_ms) for outcome in completed)
    return {"slo_ms": dict(slo_ms), "requests": good, "requests_per_s": _rate(good, duration_s)}


def meets(outcome: Outcome, slo_ms: Mapping[str, float]) -> bool:
    """Whether a completed request met every objective."""
    found = {"ttft": outcome.ttft_ns, "tpot": outcome.tpot_ns, "e2e": outcome.e2e_ns}
    if outcome.text_ns and outcome.output_tokens < 2:
        found["tpot"] = 0.0
    return meets_objectives(found, slo_ms)


def client(outcomes: Sequence[Outcome], wall_ns: int, cpu_ns: int) -> dict[str, Any]:
    """What the client itself cost, and whether it, rather than the server, set the pace."""
    lateness = distribution([o.late_ns for o in outcomes if o.late_ns is not None])
    due_times = {o.sent_ns - o.late_ns for o in outcomes if o.late_ns is not None}
    is_late = len(due_times) > 1 and (lateness["p99"] or 0.0) > LATE_MS  # all at once is never on time
    share = cpu_ns / wall_ns if wall_ns else 0.0
    return {
        "cpu_s": round(cpu_ns / 1e9, 3),
        "cpu_share_of_one_core": round(share, 4),
        "lateness_ms": lateness if due_times else None,
        "is_bottleneck": is_late or share > BUSY_SHARE,
    }


def remarks(figures: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    found, sentences = figures["tokens"], []
    if found["without_usage"]:
        sentences.append(f"{found['without_usage']} answers came without usage; their chunks were counted as tokens.")
    if found["text_chunks"] and found["output"] > found["text_chunks"]:
        per_chunk = found["output"] / found["text_chunks"]
        sentences.append(f"A chunk carried {per_chunk:.2f} tokens on average: ITL is between chunks, TPOT per token.")
    if found["without_text"]:
        sentences.append(f"{found['without_text']} answers carried no text: they have no TTFT.")
    if figures["client"]["is_bottleneck"]:
        sentences.append("The client was the bottleneck: lower the load, or free a core for it.")
    return sentences


def _duration_s(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    return (max(o.ended_ns for o in outcomes) - min(o.sent_ns for o in outcomes)) / 1e9


def _rate(count: int, duration_s: float) -> float:
    return round(count / duration_s, 4) if duration_s else 0.0
