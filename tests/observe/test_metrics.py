"""The metrics of the real engine: names and types against vLLM's, values after known requests, restarts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine import async_engine
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.links import ProcessLink
from nanovllm.engine.messages import EngineInfo, EngineStats, ErrorInfo, Finished, StepReport
from nanovllm.engine.request_stream import RequestStream
from nanovllm.errors import DeadlineError, ExecutionError, UnhealthyError
from nanovllm.observe.instruments import Histogram
from nanovllm.observe.metrics import Ended, EngineMetrics, Reading
from nanovllm.observe.tracing import SEMCONV_VERSION
from nanovllm.serve.metrics import ServerMetrics, measure_loop_lag

# name as it is exported, type, labels beyond model_name and engine: from vLLM's vllm/v1/metrics/loggers.py
VLLM = {
    "num_requests_running": ("gauge", set()),
    "num_requests_waiting": ("gauge", set()),
    "kv_cache_usage_perc": ("gauge", set()),
    "cache_config_info": ("gauge", {"block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"}),
    "num_preemptions_total": ("counter", set()),
    "prefix_cache_queries_total": ("counter", set()),
    "prefix_cache_hits_total": ("counter", set()),
    "prompt_tokens_total": ("counter", set()),
    "generation_tokens_total": ("counter", set()),
    "request_success_total": ("counter", {"finished_reason"}),
    "admission_rejections_total": ("counter", {"reason"}),
    "iteration_tokens_total": ("histogram", set()),
    "request_prompt_tokens": ("histogram", set()),
    "request_generation_tokens": ("histogram", set()),
    "request_max_num_generation_tokens": ("histogram", set()),
    "time_to_first_token_seconds": ("histogram", set()),
    "inter_token_latency_seconds": ("histogram", set()),
    "request_time_per_output_token_seconds": ("histogram", set()),
    "e2e_request_latency_seconds": ("histogram", set()),
    "request_queue_time_seconds": ("histogram", set()),
    "request_prefill_time_seconds": ("histogram", set()),
    "request_decode_time_seconds": ("histogram", set()),
    "request_inference_time_seconds": ("histogram", set()),
}
OTHERS = {
    "cached_tokens_total": ("counter", {"cache_source"}),  # SGLang's
    "num_aborted_requests_total": ("counter", set()),  # SGLang's
    "loop_lag_seconds": ("histogram", set()),
    "event_bus_dropped_total": ("counter", set()),
    "live_requests": ("gauge", set()),
    "prefilling_requests": ("gauge", set()),
    "kv_table_entries": ("gauge", set()),
    "kv_blocks": ("gauge", {"state"}),
    "kv_bytes": ("gauge", {"kind"}),
    "http_requests_total": ("counter", {"status"}),
    "state_loads_total": ("counter", {"outcome"}),
    "state_blocks_total": ("counter", {"outcome"}),
    "state_tier_held_bytes": ("gauge", {"tier", "kind"}),
    "state_tier_quota_bytes": ("gauge", {"tier"}),
    "state_tier_reads_total": ("counter", {"tier", "kind", "outcome"}),
    "state_tier_bytes_total": ("counter", {"tier", "kind", "direction"}),
    "state_load_blocks_total": ("counter", {"tier", "kind", "outcome"}),
    "state_tier_evictions_total": ("counter", {"tier", "kind", "outcome"}),
    "state_tier_failures_total": ("counter", {"tier", "kind"}),
    "tier_breaker_state": ("gauge", {"tier", "direction"}),
}
BUCKETS = {  # vLLM's
    "time_to_first_token_seconds": "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0"
    " 40.0 80.0 160.0 640.0 2560.0 +Inf",
    "inter_token_latency_seconds": "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0"
    " 80.0 +Inf",
    "e2e_request_latency_seconds": "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0"
    " 480.0 960.0 1920.0 7680.0 +Inf",
    "iteration_tokens_total": "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0 +Inf",
}
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
Page = dict[tuple[str, str], float]  # (sample without prefix, the label beyond the common ones): value
Body = Callable[[AsyncEngine, ServerMetrics], Awaitable[None]]


def page_of(page: bytes, prefix: str = "nanovllm") -> Page:
    values: Page = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            own = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            values[sample.name.removeprefix(f"{prefix}:"), own[0] if own else ""] = sample.value
    return values


def run(body: Body, *, in_process: bool = False, prefix: str = "nanovllm", **settings: object) -> None:
    async def whole() -> None:
        config = EngineConfig.from_kwargs("tiny:random", **{"dtype": "float32", "kv_memory": "4MiB", **settings})
        engine = AsyncEngine(config, in_process_of_its_own=in_process)
        metrics = ServerMetrics(engine, prefix=prefix, rejections=lambda: {"server_overloaded": 3})
        assert page_of(metrics.render()[0], prefix)["num_requests_running", ""] == 0  # before anything is loaded
        await engine.start()
        try:
            await asyncio.wait_for(body(engine, metrics), 60)
        finally:
            await engine.close()

    asyncio.run(whole())


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token for deltas in [d async for d in stream] for delta in deltas for token in delta.token_ids]


async def at_rest(engine: AsyncEngine) -> None:
    while engine.stats.running or engine.stats.waiting or engine.stats.free_blocks < engine.stats.num_blocks:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("prefix", ["nanovllm", "vllm"])
def test_names_types_labels_and_buckets(prefix: str) -> None:
    async def body(engine: AsyncEngine, metrics: ServerMetrics) -> None:
        await tokens_of(engine.submit([1, 2, 3], PARAMS))
        metrics.answered(200)
        page, content_type = metrics.render()
        assert content_type == "text/plain; version=0.0.4; charset=utf-8"
        families = list(text_string_to_metric_families(page.decode()))
        found = {}
        for family in families:
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert {"model_name", "engine"} <= labels and family.documentation
            found[name.removeprefix(f"{prefix}:")] = (family.type, labels - {"model_name", "engine"})
            assert name.startswith(f"{prefix}:")
            assert all(s.labels["model_name"] == "tiny:random" for s in family.samples)
        assert found == VLLM | OTHERS
        for name, expected in BUCKETS.items():
            family = next(family for family in families if family.name == f"{prefix}:{name}")
            assert " ".join(s.labels["le"] for s in family.samples if "le" in s.labels) == expected

    run(body, prefix=prefix)


def test_values_after_known_requests() -> None:
    prompts = [list(range(1, 40)), list(range(1, 40)), [9] * 20]

    async def body(engine: AsyncEngine, metrics: ServerMetrics) -> None:
        for prompt in prompts:  # one after the other: the second finds the first one's blocks
            await tokens_of(engine.submit(prompt, PARAMS))
        several = engine.submit([5] * 10, SamplingParams(temperature=1, seed=1, n=3, max_tokens=7, ignore_eos=True))
        await tokens_of(several)
        assert several.finished is not None
        await at_rest(engine)
        page = page_of(metrics.render()[0])
        cached = 32  # two whole blocks of 16
        assert page["request_success_total", "length"] == 4
        assert page["request_success_total", "stop"] == page["request_success_total", "error"] == 0
        assert page["generation_tokens_total", ""] == 3 * 12 + 3 * 7
        assert page["prompt_tokens_total", ""] == engine.stats.prefill_tokens
        assert page["prefix_cache_queries_total", ""] == 39 + 39 + 20 + 10
        assert page["prefix_cache_hits_total", ""] == page["cached_tokens_total", "device"] == cached
        assert page["request_prompt_tokens_sum", ""] == 39 + 39 + 20 + 10
        assert page["request_generation_tokens_sum", ""] == 3 * 12 + 3 * 7
        assert page["request_max_num_generation_tokens_sum", ""] == 3 * 12 + 7
        assert page["inter_token_latency_seconds_count", ""] == 3 * 11 + 6
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
            assert page[f"{name}_seconds_count", ""] == 4
        assert page["iteration_tokens_total_count", ""] == engine.stats.steps
        assert page["iteration_tokens_total_sum", ""] == engine.stats.prefill_tokens + engine.stats.decode_tokens
        assert page["kv_cache_usage_perc", ""] == page["num_requests_running", ""] == 0
        assert page["admission_rejections_total", "server_overloaded"] == 3

    run(body, block_size=16)


def test_gauges_while_requests_run() -> None:
    async def body(engine: AsyncEngine, metrics: ServerMetrics) -> None:
        endless = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
        streams = [engine.submit([i] * 32, endless) for i in range(1, 4)]
        while engine.stats.running < 2:
            await asyncio.sleep(0)
        page = page_of(metrics.render()[0])
        assert (page["num_requests_running", ""], page["num_requests_waiting", ""]) == (2, 1)
        assert 0 < page["kv_cache_usage_perc", ""] < 1
        check_state(page, engine)
        for stream in streams:
            stream.close()
        await at_rest(engine)
        while engine.stats.steps and page_of(metrics.render()[0])["request_success_total", "abort"] < 3:
            await asyncio.sleep(0.01)
        page = page_of(metrics.render()[0])
        assert page["num_aborted_requests_total", ""] == 3 and page["kv_cache_usage_perc", ""] == 0

    run(body, max_num_seqs=2)


def check_state(page: Page, engine: AsyncEngine) -> None:
    """The state counter as metrics: two requests hold blocks that they do not share."""
    info, used = engine.info, page["kv_blocks", "used"]
    assert page["live_requests", ""] == 2 >= page["prefilling_requests", ""]
    assert page["kv_table_entries", ""] == used > 0
    assert sum(page["kv_blocks", state] for state in ("used", "cached", "free")) == info.num_blocks
    assert page["kv_bytes", "kv_held"] == used * info.block_bytes > 0
    assert (
        sum(page["kv_bytes", kind] for kind in ("kv_held", "kv_cached", "free")) == info.num_blocks * info.block_bytes
    )


def test_counters_outlive_the_engine_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "RESTART_S", 0.0)

    async def body(engine: AsyncEngine, metrics: ServerMetrics) -> None:
        await tokens_of(engine.submit([1] * 30, PARAMS))
        await at_rest(engine)
        before = page_of(metrics.render()[0])
        live = engine.submit([2] * 30, SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True))
        async for _ in live:
            break
        link = engine.link
        assert isinstance(link, ProcessLink) and link.pid is not None
        os.kill(link.pid, signal.SIGKILL)
        with pytest.raises(UnhealthyError):
            await tokens_of(live)
        down = page_of(metrics.render()[0])
        assert down["num_requests_running", ""] == down["kv_cache_usage_perc", ""] == 0
        while engine.state != "ready":
            await asyncio.sleep(0.02)
        await tokens_of(engine.submit([1] * 30, PARAMS))
        await at_rest(engine)
        after = page_of(metrics.render()[0])
        for old, new in ((before, down), (down, after)):
            assert not [key for key in old if key[0].endswith(("_total", "_count", "_bucket")) and old[key] > new[key]]
        assert after["prompt_tokens_total", ""] == before["prompt_tokens_total", ""] + 30 + 30
        assert after["request_success_total", "length"] == 2

    run(body, in_process=True)


def test_two_engines_do_not_mix() -> None:
    async def body(first: AsyncEngine, metrics: ServerMetrics) -> None:
        second = AsyncEngine(first.config)
        others = ServerMetrics(second, prefix="vllm", model_name="another")
        await second.start()
        try:
            await tokens_of(first.submit([1, 2, 3], PARAMS))
        finally:
            await second.close()
        assert page_of(metrics.render()[0])["generation_tokens_total", ""] == 12
        page = others.render()[0]
        assert page_of(page, "vllm")["generation_tokens_total", ""] == 0
        assert b'model_name="another"' in page and b"nanovllm:" not in page

    run(body)


def test_loop_lag_is_measured_until_cancelled() -> None:
    async def whole() -> Histogram:
        lag = Histogram((1.0,), 10**9)
        task = asyncio.create_task(measure_loop_lag(lag))
        while lag.count < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        assert await asyncio.gather(task, return_exceptions=True)
        return lag

    lag = asyncio.run(whole())
    assert lag.count == 2 and lag.sum >= 0


@pytest.mark.parametrize("page", ["metrics.md", "metrics.zh.md"])
def test_the_pages_name_what_is_exported(page: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)(?:\{[\w,]+\})?`", row)}
    assert named == set(VLLM | OTHERS) and SEMCONV_VERSION in text


# -- without an engine ---------------------------------------------------------------------------------


class ScriptedEngine:
    """What ServerMetrics needs of an engine, and nothing else."""

    def __init__(self) -> None:
        self.config = EngineConfig.from_kwargs("m")
        self.stats, self.listeners = EngineStats(), []
        self.info = EngineInfo("m", 10, 64, 16, 4, 4, 64, "off", "float32", "cpu")


def test_how_a_request_ended() -> None:
    engine = ScriptedEngine()
    metrics = ServerMetrics(engine)  # type: ignore[arg-type]
    errors = [ErrorInfo.of(ExecutionError("x")), ErrorInfo.of(DeadlineError("x"))]
    ends = [Finished("a", error=error) for error in errors] + [
        Finished("b", finish_reasons=reasons)
        for reasons in (["stop"], ["length", "stop"], ["stop", "abort"], ["stop", "error"], [], ["stop"])
    ]
    engine.listeners[0](StepReport(EngineStats(), finished=ends))
    page = page_of(metrics.render()[0])
    assert {r: page["request_success_total", r] for r in ("stop", "length", "abort", "error")} == {
        "stop": 2,
        "length": 1,
        "abort": 2,
        "error": 3,
    }
    assert page["prefix_cache_queries_total", ""] == page["request_prompt_tokens_count", ""] == 0  # none was scheduled


def test_steps_that_said_nothing_are_shared_out() -> None:
    metrics = EngineMetrics("vllm", "m", Reading)
    metrics.stepped(Reading(steps=1, prefill_tokens=10), 1)
    metrics.stepped(Reading(steps=4, prefill_tokens=10, decode_tokens=8), 2)  # 8 tokens in 3 steps: 2, 3 and 3
    page = page_of(metrics.render()[0], "vllm")
    assert page["iteration_tokens_total_count", ""] == 4 and page["iteration_tokens_total_sum", ""] == 18
    assert page["iteration_tokens_total_bucket", "8.0"] == 3 and page["iteration_tokens_total_bucket", "1.0"] == 0


def test_a_scrape_between_two_reports_hides_no_step() -> None:
    now = [Reading()]
    metrics = EngineMetrics("vllm", "m", lambda: now[0])
    now[0] = Reading(steps=2, prefill_tokens=6)  # told by a heartbeat
    assert page_of(metrics.render()[0], "vllm")["prompt_tokens_total", ""] == 6
    metrics.stepped(Reading(steps=3, prefill_tokens=9), 1)
    page = page_of(metrics.render()[0], "vllm")
    assert page["iteration_tokens_total_count", ""] == 3 and page["iteration_tokens_total_sum", ""] == 9


def test_an_unknown_end_is_an_error_and_no_new_label() -> None:
    metrics = EngineMetrics("vllm", "m", Reading)
    metrics.ended(Ended("a request id"))
    page = metrics.render()[0]
    assert b"a request id" not in page and page_of(page, "vllm")["request_success_total", "error"] == 1
