"""Spans of requests, under OpenTelemetry's conventions for generative AI.

What it is: one span a request, with its phases as children, made at the request's end from
plain values, and the queue that carries spans to a collector. What it knows nothing about:
the engine, HTTP, text: no prompt and no answer is ever in a span. Needs the `otel` extra.
Invariants: recording takes no lock that exporting holds and never raises; the queue is
bounded and forgets the oldest; a collector that is slow, down or foreign costs spans, not
requests; nothing is set globally, so two servers of one process do not mix.

The conventions are not stable yet ("Development"), so their version is pinned and written
into every span's scope; it changes with this package's version and not before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

SEMCONV_VERSION = "1.41.1"  # the last with gen_ai in it; since then in semantic-conventions-genai, of no version
SCHEMA_URL = f"https://opentelemetry.io/schemas/{SEMCONV_VERSION}"
PROVIDER = "nanovllm"
TRACES_PATH = "/v1/traces"
EXPORT_S = 5.0  # for one try
CLOSE_S = 2.0  # for what is still queued at the end


@dataclass(frozen=True)
class Phase:
    """A stretch of a request, monotonic nanoseconds."""

    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class RequestSpan:
    """A request that is over. Times are monotonic nanoseconds; `attributes` that are None are left out."""

    operation: str
    model: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue | None] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    error_type: str | None = None
    is_our_failure: bool = False
    parent: Mapping[str, str] = field(default_factory=dict)  # traceparent and tracestate, as they came


class Tracer:
    """Records requests and hands them to `exporter`, from a thread of its own, a batch at a time."""

    def __init__(self, exporter: SpanExporter, *, service: Mapping[str, str]) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(resource=Resource.create(dict(service)), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nanovllm", service.get("service.version"), schema_url=SCHEMA_URL)
        self._offset_ns = time.time_ns() - time.monotonic_ns()  # once: spans of one server keep their order
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: RequestSpan) -> None:
        """Make the request's spans. A malformed parent is no parent."""
        context = self._propagator.extract(request.parent, context=Context())
        given = {
            "gen_ai.operation.name": request.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": request.model,
            "error.type": request.error_type,
            **request.attributes,
        }
        span = self._tracer.start_span(
            f"{request.operation} {request.model}",
            context,
            SpanKind.SERVER,
            {name: value for name, value in given.items() if value is not None},
            start_time=request.start_ns + self._offset_ns,
        )
        if span.is_recording():
            self._finish(span, request)

    def flush(self) -> None:
        """Send what is queued now; for tests."""
        self._provider.force_flush()

    def close(self) -> None:
        """Send what is queued, within `CLOSE_S`, and end. Blocks; safe to repeat."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()  # ends its waiting between tries

    def _finish(self, span: Span, request: RequestSpan) -> None:
        parent = set_span_in_context(span, Context())
        for phase in request.phases:
            child = self._tracer.start_span(phase.name, parent, start_time=phase.start_ns + self._offset_ns)
            child.end(phase.end_ns + self._offset_ns)
        if request.is_our_failure:
            span.set_status(Status(StatusCode.ERROR))  # as for any server: what the client got wrong is not our error
        span.end(request.end_ns + self._offset_ns)


def otlp_exporter(endpoint: str | None) -> SpanExporter:
    """An exporter to a collector's base address; without one, to where OTEL_EXPORTER_OTLP_* point."""
    if endpoint is None:
        return OTLPSpanExporter(timeout=EXPORT_S)
    address = endpoint.rstrip("/")
    return OTLPSpanExporter(address if address.endswith(TRACES_PATH) else address + TRACES_PATH, timeout=EXPORT_S)
