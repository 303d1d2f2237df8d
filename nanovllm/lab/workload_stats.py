"""What a workload is made of: lengths, arrivals, overlap, counted from its plan before anything runs.

What it is: figures over a `Workload`. What it knows nothing about: engines. Invariants:
counts of a plan are labelled `simulated`, for nothing was served; overlap comes from the observe-only probe
and keeps its label and statement; answers, which no plan knows, stand in as tokens nobody else has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from statistics import fmean, pvariance
from typing import Any

from nanovllm.lab.draws import Draws
from nanovllm.lab.workloads import PlannedRequest, Workload
from nanovllm.observe.probe import OverlapFigure, PrefixProbe, total

LABEL = "simulated"


def describe(workload: Workload, block_size: int = 16) -> dict[str, Any]:
    """The workload in figures."""
    arrivals = [request.arrival_ns for request in workload.requests if request.arrival_ns is not None]
    return {
        "label": LABEL,
        "workload": workload.name,
        "knobs": workload.knobs.as_dict(),
        "requests": len(workload.requests),
        "sessions": len({request.session for request in workload.requests}),
        "namespaces": len({request.namespace for request in workload.requests}),
        "prompt_len": spread_of(workload.prompt_lens().values()),
        "output_len": spread_of(request.output_len for request in workload.requests),
        "gap_variation": gap_variation(sorted(arrivals)),
        "overlap": total(overlap(workload, block_size), block_size).as_dict(),
    }


def spread_of(values: Iterable[int]) -> dict[str, float]:
    """Mean, population variance and range."""
    kept = list(values)
    return {"mean": fmean(kept), "variance": pvariance(kept), "min": min(kept), "max": max(kept), "sum": sum(kept)}


def gap_variation(arrivals_ns: list[int]) -> float | None:
    """Standard deviation of the gaps between arrivals over their mean: 1 for a Poisson process, more in bursts.

    None where there are no gaps, or all are zero.
    """
    gaps = [later - earlier for earlier, later in pairwise(arrivals_ns)]
    mean = fmean(gaps) if gaps else 0.0
    return pvariance(gaps) ** 0.5 / mean if mean else None


def overlap(workload: Workload, block_size: int) -> list[OverlapFigure]:
    """What the probe says of the plan: sessions side by side, turn after turn; all observe-only."""
    probe = PrefixProbe([block_size])
    by_turn = sorted(conversations(workload), key=lambda found: found[0].turn)
    for request, prompt, answered in by_turn:
        probe.entered(prompt, request.namespace)
        probe.finished(answered, request.namespace)
    return probe.figures()


def conversations(workload: Workload) -> Iterator[tuple[PlannedRequest, list[int], list[int]]]:
    """Each request with its prompt, and with prompt and stand-in answer but for the last token."""
    whole: dict[str, list[int]] = {}
    for request in workload.requests:
        history = whole[request.after] if request.continues and request.after else []
        prompt = [*history, *(token_id for part in request.parts for token_id in part.token_ids)]
        answers = Draws(workload.knobs.seed, "answer", request.request_id)
        answer = answers.tokens(request.output_len, workload.knobs.vocab)
        whole[request.request_id] = [*prompt, *answer]
        yield request, prompt, whole[request.request_id][:-1]
