"""Spans: their attributes, parents and times; and a real receiver, there, gone, and slow."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.messages import Finished, Timings
from nanovllm.errors import BusyError, ConfigError, ContextLengthError
from nanovllm.observe import tracing
from nanovllm.observe.tracing import RequestSpan, Tracer, otlp_exporter
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.context import TICKET
from nanovllm.serve.tracing import Traces, open_traces

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SERVICE = {"service.name": "nanovllm", "service.version": "0"}
PARAMS = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=7)
SECRET = "the prompt nobody may see"  # noqa: S105
MS = 10**6


def scope_of(path: str = "/v1/chat/completions", **headers: str) -> dict[str, Any]:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    ticket = SimpleNamespace(request_id="given", arrival_ns=time.monotonic_ns() - 100 * MS)
    return {"path": path, "headers": pairs, TICKET: ticket, "query_string": SECRET}


def finished_at(arrival_ns: int, **changes: Any) -> Finished:
    timings = Timings(
        arrival_ns, t_queue_ns=10 * MS, t_schedule_ns=MS, t_prefill_ns=19 * MS, t_return_ns=MS, ttft_ns=31 * MS,
        end_to_end_ns=80 * MS, decode_gaps_ns=[MS],
    )  # fmt: skip
    values = {"prompt_tokens": 20, "completion_tokens": 3, "cached_tokens": 16, "finish_reasons": ["stop"]}
    return Finished("r", **{**values, "timings": timings, **changes})


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Iterator[Traces]:
    traces = Traces(Tracer(exporter, service=SERVICE))
    yield traces
    traces.close()


def spans_of(traces: Traces, exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    traces._tracer.flush()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_and_its_phases(traces: Traces, exporter: InMemorySpanExporter) -> None:
    scope = scope_of(traceparent=PARENT)
    arrival_ns = scope[TICKET].arrival_ns
    before_ns = time.time_ns()
    traces.record(scope, "tiny", PARAMS, [finished_at(arrival_ns)], is_complete=True, is_stream=True)
    spans = spans_of(traces, exporter)
    assert set(spans) == {"chat tiny", "queue", "prefill", "decode"}
    span = spans["chat tiny"]
    assert span.kind is SpanKind.SERVER and span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nanovllm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.031,
        "nanovllm.request_id": "given",
    }
    assert span.parent is not None and format(span.parent.span_id, "016x") == PARENT_ID
    assert span.context is not None and format(span.context.trace_id, "032x") == TRACE_ID
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.41.1"
    assert span.resource.attributes["service.name"] == "nanovllm"
    times = {name: (each.start_time - span.start_time, each.end_time - span.start_time) for name, each in spans.items()}  # type: ignore[operator]
    assert times["queue"] == (0, 10 * MS) and times["prefill"] == (10 * MS, 30 * MS)
    assert times["decode"] == (30 * MS, 80 * MS) and times["chat tiny"][1] >= 100 * MS
    assert all(spans[name].parent == span.context for name in ("queue", "prefill", "decode"))
    assert span.start_time is not None and before_ns - 10**9 < span.start_time < before_ns  # wall time, not monotonic
    assert SECRET not in "".join(each.to_json() for each in spans.values())


def test_several_prompts_are_one_span(traces: Traces, exporter: InMemorySpanExporter) -> None:
    scope = scope_of("/v1/completions")
    each = finished_at(scope[TICKET].arrival_ns, finish_reasons=["stop", "length"])
    params = SamplingParams(n=2, temperature=1, seed=5)
    traces.record(scope, "tiny", params, [each, each], is_complete=True)
    span = spans_of(traces, exporter)["text_completion tiny"]
    assert span.parent is None and span.attributes is not None
    assert span.attributes["gen_ai.usage.input_tokens"] == 40
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop", "length", "stop", "length")
    assert span.attributes["gen_ai.request.choice.count"] == 2 and span.attributes["gen_ai.request.seed"] == 5
    assert "gen_ai.response.time_to_first_chunk" not in span.attributes


@pytest.mark.parametrize(
    ("failure", "error_type", "status"),
    [
        (BusyError(SECRET), "server_overloaded", StatusCode.ERROR),
        (ContextLengthError(SECRET), "context_length_exceeded", StatusCode.UNSET),  # the client's, not ours
        (RuntimeError(SECRET), "RuntimeError", StatusCode.ERROR),
        (None, "client_disconnected", StatusCode.UNSET),
    ],
)
def test_failures(
    traces: Traces,
    exporter: InMemorySpanExporter,
    failure: Exception | None,
    error_type: str,
    status: StatusCode,
) -> None:
    traces.record(scope_of(), "tiny", PARAMS, [], is_complete=False, failure=failure)
    spans = spans_of(traces, exporter)
    assert set(spans) == {"chat tiny"}  # no phase is known
    span = spans["chat tiny"]
    assert span.attributes is not None and span.attributes["error.type"] == error_type
    assert span.status.status_code is status and "gen_ai.usage.input_tokens" not in span.attributes
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("parent", ["", "nonsense", f"00-{'0' * 32}-{PARENT_ID}-01", "ff" + PARENT[2:], "é" * 55])
def test_a_malformed_parent_is_no_parent(traces: Traces, exporter: InMemorySpanExporter, parent: str) -> None:
    traces.record(scope_of(traceparent=parent), "tiny", PARAMS, [], is_complete=True)
    assert spans_of(traces, exporter)["chat tiny"].parent is None


def test_an_unsampled_parent_is_respected(traces: Traces, exporter: InMemorySpanExporter) -> None:
    traces.record(scope_of(traceparent=PARENT[:-1] + "0"), "tiny", PARAMS, [], is_complete=True)
    assert not spans_of(traces, exporter)


def test_two_servers_do_not_mix(traces: Traces, exporter: InMemorySpanExporter) -> None:
    others = InMemorySpanExporter()
    other = Traces(Tracer(others, service=SERVICE))
    other.record(scope_of(), "other", PARAMS, [], is_complete=True)
    traces.record(scope_of(), "tiny", PARAMS, [], is_complete=True)
    assert set(spans_of(traces, exporter)) == {"chat tiny"} and set(spans_of(other, others)) == {"chat other"}
    other.close()


def test_recording_never_raises(traces: Traces, exporter: InMemorySpanExporter, caplog: Any) -> None:
    traces.record({}, "tiny", PARAMS, [], is_complete=True)
    assert "could not be traced" in caplog.text and not spans_of(traces, exporter)


def test_nothing_is_imported_unless_it_is_asked_for() -> None:
    code = (
        "import sys; from nanovllm.serve.tracing import open_traces; from nanovllm.serve.config import ServerConfig; "
        "assert open_traces(ServerConfig(), {}) is None; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "nanovllm.observe.tracing", None)
    with pytest.raises(ConfigError, match=r"nano-vllm-hust\[otel\]"):
        open_traces(ServerConfig(otlp_endpoint="http://127.0.0.1:1"), {})
    assert open_traces(ServerConfig(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) is None
    assert "otel" in caplog.text  # a variable for the whole cluster stops nobody


# -- a real receiver -----------------------------------------------------------------------------------


@contextmanager
def collector(answer: int = 200) -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(answer)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("from_environment", [False, True])
def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch, from_environment: bool) -> None:
    with collector() as (address, received):
        if from_environment:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
            traces = open_traces(ServerConfig())
        else:
            traces = open_traces(ServerConfig(otlp_endpoint=address + "/"), {})
        assert traces is not None
        params = SamplingParams(seed=2**64 - 1)  # larger than a span's integers: it may not cost the others
        traces.record(scope_of(), "tiny", params, [finished_at(0)], is_complete=True)
        traces.close()
        traces.close()
    ((path, request),) = received
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert names["service.name"] == "nanovllm"
    assert {span.name for span in resource.scope_spans[0].spans} == {"chat tiny", "queue", "prefill", "decode"}
    assert resource.scope_spans[0].schema_url == tracing.SCHEMA_URL


@pytest.mark.parametrize("kind", ["down", "failing"])
def test_a_bad_collector_costs_spans_and_nothing_else(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(tracing, "CLOSE_S", 0.2)
    monkeypatch.setattr(tracing, "EXPORT_S", 600.0)  # closing does not wait for that
    before = set(threading.enumerate())
    with collector(503) as (address, _):
        where = address if kind == "failing" else f"http://127.0.0.1:{closed_port()}"
        tracer = Tracer(otlp_exporter(where), service=SERVICE)
        for i in range(5000):  # more than the queue holds
            tracer.record(RequestSpan("chat", f"m{i}", 0, 1))
        tracer.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # a third of what the SDK would wait
    assert set(threading.enumerate()) <= before  # nobody is left trying
