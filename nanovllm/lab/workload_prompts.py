"""A workload as prompts and arrival times for a load generator that sends text or token ids.

What it is: the translation. What it knows nothing about: HTTP, settings. Invariants: the
plan is `workloads.generate`'s, request by request; a workload whose turns need earlier
answers is refused. Namespaces are not sent: over HTTP a tenant is a key.
"""

from __future__ import annotations

from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.lab.prompts import Prompt
from nanovllm.lab.workloads import SETTINGS, PlannedRequest, Workload, as_text, generate


def planned(name: str, **turned: Any) -> Workload:
    """The workload; a knob that is None stays as the workload has it. Raises ConfigError, InvalidRequestError."""
    workload = generate(name, **{knob: value for knob, value in turned.items() if value is not None})
    if any(request.continues for request in workload.requests):
        single = ", ".join(name for name, knobs in SETTINGS.items() if knobs.turns == 1)
        hint = f"Take one of {single}."
        raise InvalidRequestError(f"{name} has turns, which need earlier answers.", param="workload", hint=hint)
    return workload


def prompts_of(workload: Workload, vocab: int | None) -> list[Prompt]:
    """One a request, in the plan's order: words about a token each, or with `vocab` the token ids themselves."""
    return [Prompt(_content(request, vocab is not None), request.output_len) for request in workload.requests]


def arrivals_of(workload: Workload) -> list[int]:
    """Nanoseconds from the start; of an open loop."""
    return [request.arrival_ns or 0 for request in workload.requests]


def _content(request: PlannedRequest, as_ids: bool) -> str | list[int]:
    if as_ids:
        return [token_id for part in request.parts for token_id in part.token_ids]
    return " ".join(as_text(part) for part in request.parts)
