"""The Grafana dashboard asks for nothing that a live engine does not export, under either prefix."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.serve.metrics import ServerMetrics

PATH = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboard.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERY = re.compile(r"\$\{prefix\}:(\w+)(?:\{([^}]*)\})?")
BY = re.compile(r"by \(([\w, ]+)\)")


def samples_of(prefix: str) -> dict[str, set[str]]:
    """Every sample of a server that has answered, with its labels."""

    async def whole() -> bytes:
        engine = AsyncEngine(EngineConfig.from_kwargs("tiny:random", dtype="float32", kv_memory="4MiB"))
        metrics = ServerMetrics(engine, prefix=prefix)
        await engine.start()
        try:
            stream = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
            [deltas async for deltas in stream]
            while not engine.stats.tiers:  # told with the next of its beats
                await asyncio.sleep(0.01)
            metrics.answered(200)
            return metrics.render()[0]
        finally:
            await engine.close()

    families = text_string_to_metric_families(asyncio.run(whole()).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("prefix", ["nanovllm", "vllm"])
def test_every_metric_and_label_it_names_is_exported(prefix: str) -> None:
    exported = samples_of(prefix)
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    for text in EXPRESSIONS + variables:
        names = QUERY.findall(text)
        assert names and text.count("prefix") == len(names) + text.count("prefix_cache"), text
        for name, selector in names:
            labels = set(re.findall(r"(\w+)=", selector)) | {b for by in BY.findall(text) for b in by.split(", ")}
            assert labels <= exported.get(f"{prefix}:{name}", set()), f"{text} asks for {name} {labels}"


def test_it_shows_what_was_promised() -> None:
    asked = {name for text in EXPRESSIONS for name, _ in QUERY.findall(text)}
    latencies = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "loop_lag")
    for name in latencies:
        for share in ("0.5", "0.9", "0.99"):
            assert any(f"histogram_quantile({share}," in e and f"{name}_seconds_bucket" in e for e in EXPRESSIONS)
    assert asked > {
        "request_success_total",
        "num_requests_running",
        "num_requests_waiting",
        "prompt_tokens_total",
        "generation_tokens_total",
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "prefix_cache_queries_total",
        "num_preemptions_total",
        "admission_rejections_total",
    }


def test_grafana_can_take_it_as_it_is() -> None:
    assert DASHBOARD["schemaVersion"] >= 41 and "id" not in DASHBOARD
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "prefix", "model_name"]  # each before those that use it
    assert variables["prefix"]["query"] == "nanovllm,vllm" and variables["datasource"]["query"] == "prometheus"
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})
    for panel in DASHBOARD["panels"]:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["description"] and panel["type"] == "timeseries"
