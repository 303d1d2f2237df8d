"""/metrics and traces of a live server: what a request over HTTP leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.observe.tracing import Tracer
from nanovllm.serve import app
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.tracing import Traces
from tests.serve.servers import LiveServer, thread_only
from tests.serve.surface import Live, live_server

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "a prompt that stays here"  # noqa: S105
Labels = frozenset[tuple[str, str]]


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def live(exporter: InMemorySpanExporter) -> Iterator[Live]:
    def traced(config: ServerConfig) -> Traces:
        assert config.otlp_endpoint == "http://127.0.0.1:9"
        return Traces(Tracer(exporter, service={"service.name": "test"}))

    settings = {"metrics_prefix": "vllm", "served_model_name": ("tiny", "alias"), "otlp_endpoint": "http://127.0.0.1:9"}
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(app, "open_traces", traced)
            live = stack.enter_context(live_server(num_blocks=256, **settings))
        yield live


def page_of(live: Live) -> dict[tuple[str, Labels], float]:
    answer = live.http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert SECRET not in answer.text
    families = text_string_to_metric_families(answer.text)
    common = {("model_name", "tiny"), ("engine", "0")}
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.labels["model_name"] == "tiny" for sample in samples)
    return {(s.name, frozenset(set(s.labels.items()) - common)): s.value for s in samples}


def grown(live: Live, act: Callable[[], object]) -> dict[tuple[str, Labels], float]:
    """By how much each sample grew while `act` ran."""
    before = page_of(live)
    act()
    return {key: value - before.get(key, 0.0) for key, value in page_of(live).items()}


def span_of(live: Live, exporter: InMemorySpanExporter, act: Callable[[dict[str, str]], object]) -> ReadableSpan:
    """The span of the request that `act` made with the headers it is given."""
    request_id = f"test-{time.monotonic_ns()}"
    act({"x-request-id": request_id})
    assert live.services.traces is not None
    for _ in range(1000):  # the answer is sent before it is traced
        live.services.traces._tracer.flush()
        for span in exporter.get_finished_spans():
            if (span.attributes or {}).get("nanovllm.request_id") == request_id:
                return span
        time.sleep(0.01)
    raise AssertionError("no span")


def test_what_a_request_leaves_in_the_metrics(live: Live) -> None:
    def act() -> None:
        assert live.chat([{"role": "user", "content": SECRET}], max_tokens=5, ignore_eos=True).status_code == 200
        assert live.complete([1, 2, 3], max_tokens=4, ignore_eos=True, n=2).status_code == 200
        assert live.complete("x", max_tokens=-1).status_code == 400
        assert live.http.get("/nowhere").status_code == 404

    more = grown(live, act)
    nothing: Labels = frozenset()
    assert more["vllm:generation_tokens_total", nothing] == 5 + 2 * 4
    assert more["vllm:request_success_total", frozenset({("finished_reason", "length")})] == 2
    assert more["vllm:time_to_first_token_seconds_count", nothing] == 2
    statuses = {status: more["vllm:http_requests_total", frozenset({("status", status)})] for status in ("400", "404")}
    assert statuses == {"400": 1, "404": 1}
    assert more["vllm:http_requests_total", frozenset({("status", "200")})] == 3  # the page before is one


@thread_only("the reader that is too slow lives beside the engine")
def test_events_that_a_reader_missed_are_counted(server: Callable[..., LiveServer]) -> None:
    live = server(event_capacity=8)
    assert live.engine is not None
    name, reader = "\nnanovllm:event_bus_dropped_total{", live.engine.events.reader()
    live.complete(max_tokens=20)
    assert reader.poll() and reader.dropped > 0
    live.complete()  # and the engine reports
    line = live.get("/metrics").body.decode().partition(name)[2].partition("\n")[0]
    assert float(line.rpartition(" ")[2]) == reader.dropped


def test_the_loop_is_watched_while_the_server_runs(live: Live) -> None:
    key = ("vllm:loop_lag_seconds_count", frozenset())
    before = page_of(live)[key]
    while page_of(live)[key] == before:
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_a_span(live: Live, exporter: InMemorySpanExporter, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "ignore_eos": True, "model": "alias"}

    def act(headers: dict[str, str]) -> None:
        headers = {**headers, "traceparent": PARENT}
        assert live.ask("/v1/chat/completions", {**body, "stream": stream}, headers=headers).status_code == 200

    span = span_of(live, exporter, act)
    attributes = dict(span.attributes or {})
    assert span.name == "chat alias" and attributes["gen_ai.request.stream"] is stream
    assert attributes["gen_ai.usage.output_tokens"] == attributes["gen_ai.request.max_tokens"] == 5
    assert "error.type" not in attributes
    assert span.parent is not None and format(span.parent.span_id, "016x") == PARENT.split("-")[2]
    assert not [one for one in exporter.get_finished_spans() if SECRET in one.to_json()]
    children = [one for one in exporter.get_finished_spans() if one.parent == span.context]
    assert [one.name for one in children] == ["queue", "prefill", "decode"]


def test_a_completion_of_two_prompts_is_one_span(live: Live, exporter: InMemorySpanExporter) -> None:
    body = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 2, "ignore_eos": True}
    span = span_of(live, exporter, lambda headers: live.ask("/v1/completions", body, headers=headers))
    assert span.name == "text_completion tiny" and span.attributes is not None
    assert span.attributes["gen_ai.usage.input_tokens"] == 5 and span.attributes["gen_ai.usage.output_tokens"] == 4


def test_a_client_that_leaves_is_told_of(live: Live, exporter: InMemorySpanExporter) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 1900, "ignore_eos": True, "stream": True}

    def act(headers: dict[str, str]) -> None:
        with live.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            next(answer.iter_raw())

    span = span_of(live, exporter, act)
    assert span.attributes is not None and span.attributes["error.type"] == "client_disconnected"
    key = ("vllm:num_aborted_requests_total", frozenset())
    while page_of(live)[key] == 0:
        time.sleep(0.02)
