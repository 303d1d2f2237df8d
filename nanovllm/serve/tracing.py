"""Traces: what a request was, turned into a span when it is over.

What it is: the way from an answered request to `observe/tracing.py`, and what turns tracing
on. What it knows nothing about: spans, exporters. Invariants: without an endpoint nothing
of OpenTelemetry is imported; no text of a request is handed on; what goes wrong here is
logged and not the request's business. Only requests that passed the gate are traced: what
it refuses, perhaps a thousand times a second, is counted in the metrics.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanovllm import __version__
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.messages import Finished, Timings
from nanovllm.errors import ConfigError, NanoVLLMError
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.context import TICKET, Ticket
from nanovllm.serve.failures import status_of

if TYPE_CHECKING:  # needs the otel extra
    from nanovllm.observe.tracing import Phase, RequestSpan, Tracer

logger = logging.getLogger("nanovllm.serve")

CHAT_PATH = "/v1/chat/completions"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PARENT_HEADERS = (b"traceparent", b"tracestate")
MAX_INT = 2**63 - 1  # larger ones have no place in a span, and would lose the whole batch
GONE = "client_disconnected"


class Traces:
    """Records the requests of one server."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def record(
        self,
        scope: Mapping[str, Any],
        model: str,
        params: SamplingParams,
        finished: Sequence[Finished],
        *,
        is_complete: bool,
        is_stream: bool = False,
        failure: BaseException | None = None,
    ) -> None:
        """A request is over: with a `failure`, or before it was complete, or well. Never raises."""
        try:
            span = _span(scope, model, params, finished, is_complete, is_stream, failure)
            self._tracer.record(span)
        except Exception:
            logger.exception("A request could not be traced.")

    def close(self) -> None:
        """Send what is queued; blocks for seconds at most."""
        self._tracer.close()


def open_traces(config: ServerConfig, env: Mapping[str, str] = os.environ) -> Traces | None:
    """Tracing, where --otlp-endpoint or OpenTelemetry's own variables ask for it. Raises ConfigError."""
    if config.otlp_endpoint is None and not any(env.get(name) for name in ENDPOINT_VARIABLES):
        return None
    try:
        from nanovllm.observe.tracing import Tracer, otlp_exporter
    except ImportError as error:
        missing = ConfigError(
            f"Tracing needs OpenTelemetry: {error}.",
            param="otlp_endpoint",
            hint="Install it with: pip install 'nano-vllm-hust[otel]'.",
        )
        if config.otlp_endpoint is not None:
            raise missing from error
        logger.warning("%s", missing)  # the variable is often set for a whole cluster
        return None
    service = {"service.name": env.get("OTEL_SERVICE_NAME") or "nanovllm", "service.version": __version__}
    return Traces(Tracer(otlp_exporter(config.otlp_endpoint), service=service))


def _span(
    scope: Mapping[str, Any],
    model: str,
    params: SamplingParams,
    finished: Sequence[Finished],
    is_complete: bool,
    is_stream: bool,
    failure: BaseException | None,
) -> RequestSpan:
    from nanovllm.observe.tracing import RequestSpan

    ticket: Ticket = scope[TICKET]
    return RequestSpan(
        operation="chat" if scope["path"] == CHAT_PATH else "text_completion",
        model=model,
        start_ns=ticket.arrival_ns,
        end_ns=time.monotonic_ns(),
        attributes={
            **_asked(params),
            **_used(finished, is_stream),
            "nanovllm.request_id": ticket.request_id,
        },
        phases=_phases(finished[0].timings) if finished else (),
        error_type=_error_type(failure, is_complete),
        is_our_failure=failure is not None and status_of(failure) >= 500,
        parent={name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in PARENT_HEADERS},
    )


def _asked(params: SamplingParams) -> dict[str, Any]:
    return {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.seed": params.seed if params.seed is None or params.seed <= MAX_INT else None,
        "gen_ai.request.choice.count": params.n if params.n != 1 else None,
    }


def _used(finished: Sequence[Finished], is_stream: bool) -> dict[str, Any]:
    if not finished:
        return {"gen_ai.request.stream": is_stream}
    ttft_ns = finished[0].timings.ttft_ns if finished[0].timings else None
    return {
        "gen_ai.request.stream": is_stream,
        "gen_ai.usage.input_tokens": sum(each.prompt_tokens for each in finished),
        "gen_ai.usage.output_tokens": sum(each.completion_tokens for each in finished),
        "gen_ai.usage.cache_read.input_tokens": sum(each.cached_tokens for each in finished),
        "gen_ai.response.finish_reasons": [reason for each in finished for reason in each.finish_reasons],
        "gen_ai.response.time_to_first_chunk": None if ttft_ns is None or not is_stream else ttft_ns / 1e9,
    }


def _phases(timings: Timings | None) -> tuple[Phase, ...]:
    """Queue, prefill and decode of the first prompt's first sample, as far as it came."""
    from nanovllm.observe.tracing import Phase

    if timings is None or timings.t_queue_ns is None:
        return ()
    scheduled_ns = timings.arrival_ns + timings.t_queue_ns
    phases = [Phase("queue", timings.arrival_ns, scheduled_ns)]
    if timings.t_prefill_ns is not None:
        first_ns = scheduled_ns + (timings.t_schedule_ns or 0) + timings.t_prefill_ns
        phases.append(Phase("prefill", scheduled_ns, first_ns))
        if timings.end_to_end_ns is not None:
            phases.append(Phase("decode", first_ns, timings.arrival_ns + timings.end_to_end_ns))
    return tuple(phases)


def _error_type(failure: BaseException | None, is_complete: bool) -> str | None:
    """A word of ours for what went wrong; what an exception says may quote a prompt."""
    if failure is None:
        return None if is_complete else GONE
    return failure.code if isinstance(failure, NanoVLLMError) else type(failure).__name__
