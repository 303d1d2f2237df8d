"""The engine's metrics under vLLM's names, from a registry of their own.

What it is: every gauge, counter and histogram that the server exports, fed with plain
values, and the page that Prometheus reads. What it knows nothing about: the engine, HTTP,
who sent a request. Invariants: nothing is global, so two engines of one process do not
mix; counters never go down, though an engine process that is replaced counts from 0; the
only labels are the model, the engine's number and small fixed sets: no request, session,
tenant or path ever is one.

Names, types, labels and buckets are vLLM's, so `--metrics-prefix vllm` serves a dashboard
made for vLLM. `cached_tokens_total` and `num_aborted_requests_total` are SGLang's names;
`loop_lag_seconds`, `event_bus_dropped_total`, `http_requests_total`, the tiers' (`tier_metrics.py`) and
the state counter (`live_requests`, `prefilling_requests`, `kv_blocks`, `kv_table_entries`, `kv_bytes`,
`state_*`) are ours. Where we differ: histograms of a request are observed at its end, and from its first sample; token
histograms have the same buckets whatever the model's context, so servers can be added up.
Not exported, for nothing measures it: how long blocks live (vLLM's `kv_block_*`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanovllm.observe.instruments import Histogram, Monotone
from nanovllm.observe.metric_names import (
    COUNTERS,
    HISTOGRAMS,
    LOADS,
    PREFILLED,
    READ_FROM_ENGINE,
    REASONS,
    REJECTIONS,
    SPILLS,
)
from nanovllm.observe.tier_metrics import TierFacts, TierMetrics, Values

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


@dataclass(frozen=True)
class Reading:
    """The engine's state of this moment, and its counters since its own start."""

    running: int = 0
    waiting: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    block_bytes: int = 0
    live_requests: int = 0
    prefilling_requests: int = 0
    table_entries: int = 0
    steps: int = 0
    preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    events_dropped: int = 0
    state: Mapping[str, int] = field(default_factory=dict)  # `TieredState.facts`
    tiers: TierFacts = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """A request that is over. Times are nanoseconds; None where that moment never came."""

    reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    longest_answer: int = 0
    queried_tokens: int = 0  # looked for in the prefix cache
    cached_tokens: int = 0  # found
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)  # where they lay; empty: on the device
    queue_ns: int | None = None
    prefill_ns: int | None = None
    ttft_ns: int | None = None
    decode_ns: int | None = None
    end_to_end_ns: int | None = None
    gaps_ns: list[int] = field(default_factory=list)


class EngineMetrics(Collector):
    """One engine's metrics. `read` and `rejections` (by code) are asked at each scrape."""

    def __init__(
        self,
        prefix: str,
        model_name: str,
        read: Callable[[], Reading],
        rejections: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._prefix, self._read, self._rejections = f"{prefix}:", read, rejections
        self._labels = {"model_name": model_name, "engine": "0"}
        self._histograms = {name: Histogram(bounds, unit) for name, (_, bounds, unit) in HISTOGRAMS.items()}
        self._totals = dict.fromkeys(COUNTERS, 0)
        self._cached = Counter({"device": 0})
        self._state_counts = {name: Monotone() for name in (*LOADS, *SPILLS)}
        self._tiers = TierMetrics()
        self._sources = {name: Monotone() for name in (*READ_FROM_ENGINE, "steps", "decode_tokens")}
        self._observed_steps = self._observed_tokens = 0
        self._outcomes = Counter(dict.fromkeys(REASONS, 0))
        self._answers: Counter[int] = Counter()  # by HTTP status
        self._cache: dict[str, str] | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    # -- what happened -----------------------------------------------------------------------------

    def loaded(self, **cache: object) -> None:
        """The engine's cache settings are known: labels of `cache_config_info`."""
        self._cache = {name: str(value) for name, value in cache.items()}

    def stepped(self, reading: Reading, num_tokens: int) -> None:
        """A step, or a few that said nothing, have generated `num_tokens`."""
        self._take(reading)
        self._totals["generation_tokens"] += num_tokens
        self._observe_steps()

    def ended(self, request: Ended) -> None:
        """A request is over."""
        self._outcomes[request.reason if request.reason in REASONS else "error"] += 1
        self._totals["num_aborted_requests"] += request.reason == "abort"
        if request.reason == PREFILLED:  # a document's KV: nobody waited for an answer, so it has no place among times
            return
        if request.queue_ns is not None:  # it was scheduled
            self._totals["prefix_cache_queries"] += request.queried_tokens
            self._totals["prefix_cache_hits"] += request.cached_tokens
            self._cached.update(request.cached_by_tier or {"device": request.cached_tokens})
            self._observe("request_prompt_tokens", request.prompt_tokens)
            self._observe("request_generation_tokens", request.completion_tokens)
            self._observe("request_max_num_generation_tokens", request.longest_answer)
        self._observe_times(request)

    def answered(self, status: int) -> None:
        """An HTTP request was answered."""
        self._answers[status] += 1

    @property
    def loop_lag(self) -> Histogram:
        """Takes the event loop's lateness, nanoseconds."""
        return self._histograms["loop_lag_seconds"]

    # -- the page ----------------------------------------------------------------------------------

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE

    def collect(self) -> Iterator[Metric]:
        """Every family, as of now."""
        reading = self._read()
        self._take(reading)
        yield from self._gauges(reading)
        for row in self._tiers.rows(reading.tiers):
            make = self._counter if row.is_counter else self._gauges_of
            yield make(row.name, row.text, row.values, *row.labels)
        for name, text in COUNTERS.items():
            yield self._counter(name, text, {(): self._totals[name]})
        yield from self._labelled_counters()
        for name, (text, _, _) in HISTOGRAMS.items():
            yield self._histograms[name].family(self._prefix + name, text, self._labels)

    def _gauges(self, reading: Reading) -> Iterator[Metric]:
        used = reading.num_blocks - reading.free_blocks
        yield self._gauge("num_requests_running", "Requests in the engine's batch.", reading.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for the engine.", reading.waiting)
        share = used / reading.num_blocks if reading.num_blocks else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", share)
        yield from self._state(reading, used)
        if self._cache is not None:
            yield self._gauge("cache_config_info", "The KV cache's settings, as labels.", 1, self._cache)

    def _state(self, reading: Reading, used: int) -> Iterator[Metric]:
        """The state counter: who holds blocks, blocks by state, bytes by kind; entries over used: sharing."""
        blocks = {"used": used, "cached": reading.cached_blocks, "free": reading.free_blocks - reading.cached_blocks}
        yield self._gauge("live_requests", "Requests that hold KV blocks.", reading.live_requests)
        yield self._gauge("prefilling_requests", "Of them, those still in prefill.", reading.prefilling_requests)
        yield self._gauge("kv_table_entries", "Block table entries of live requests.", reading.table_entries)
        by_state: Values = {(state,): count for state, count in blocks.items()}
        yield self._gauges_of("kv_blocks", "KV blocks by state.", by_state, "state")
        kinds = dict(zip(("kv_held", "kv_cached", "free"), blocks.values(), strict=True))
        sizes: Values = {(kind,): count * reading.block_bytes for kind, count in kinds.items()}
        yield self._gauges_of("kv_bytes", "The KV pool's bytes by kind.", sizes, "kind")

    def _labelled_counters(self) -> Iterator[Metric]:
        counts = {**dict.fromkeys(REJECTIONS, 0), **self._rejections()}
        rejected: Values = {(code,): count for code, count in counts.items()}
        outcomes: Values = {(reason,): count for reason, count in self._outcomes.items()}
        answers: Values = {(str(status),): count for status, count in self._answers.items()}
        cached: Values = {(tier,): tokens for tier, tokens in self._cached.items()}
        yield self._counter("request_success", "Requests that are over.", outcomes, "finished_reason")
        yield self._counter("admission_rejections", "Requests refused for lack of room.", rejected, "reason")
        yield self._counter("cached_tokens", "Prompt tokens found, by where they lay.", cached, "cache_source")
        yield self._counter("http_requests", "HTTP requests answered.", answers, "status")
        for name, text, facts in (
            ("state_loads", "Loads of KV from lower tiers.", LOADS),
            ("state_blocks", "KV blocks on their way to lower tiers.", SPILLS),
        ):
            moved: Values = {(as_,): self._state_counts[fact].total for fact, as_ in facts.items()}
            yield self._counter(name, text, moved, "outcome")

    def _gauge(self, name: str, text: str, value: float, more: dict[str, str] | None = None) -> Metric:
        labels = {**self._labels, **(more or {})}
        family = GaugeMetricFamily(self._prefix + name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _gauges_of(self, name: str, text: str, values: Values, *labels: str) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=[*self._labels, *labels])
        for own, value in values.items():
            family.add_metric([*self._labels.values(), *own], value)
        return family

    def _counter(self, name: str, text: str, values: Values, *labels: str) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=[*self._labels, *labels])
        for own, value in values.items():
            family.add_metric([*self._labels.values(), *own], value)
        return family

    # -- inside ------------------------------------------------------------------------------------

    def _take(self, reading: Reading) -> None:
        """Move the counters that the engine keeps."""
        for name, source in self._sources.items():
            source.read(getattr(reading, name))
        for fact, source in self._state_counts.items():
            source.read(reading.state.get(fact, 0))
        for name, metric in READ_FROM_ENGINE.items():
            self._totals[metric] = self._sources[name].total

    def _observe_steps(self) -> None:
        """The steps since the last report; those that handed nothing over are told of with the next: shared evenly."""
        steps = self._sources["steps"].total
        tokens = self._sources["prefill_tokens"].total + self._sources["decode_tokens"].total
        new_steps, new_tokens = steps - self._observed_steps, tokens - self._observed_tokens
        self._observed_steps, self._observed_tokens = steps, tokens
        if new_steps:
            share, rest = divmod(new_tokens, new_steps)
            self._histograms["iteration_tokens_total"].observe(share, new_steps - rest)
            self._histograms["iteration_tokens_total"].observe(share + 1, rest)

    def _observe(self, name: str, value: int | None) -> None:
        if value is not None:
            self._histograms[name].observe(value)

    def _observe_times(self, request: Ended) -> None:
        self._observe("time_to_first_token_seconds", request.ttft_ns)
        self._observe("request_queue_time_seconds", request.queue_ns)
        self._observe("request_prefill_time_seconds", request.prefill_ns)
        self._observe("request_decode_time_seconds", request.decode_ns)
        self._observe("e2e_request_latency_seconds", request.end_to_end_ns)
        if request.prefill_ns is not None and request.decode_ns is not None:
            self._observe("request_inference_time_seconds", request.prefill_ns + request.decode_ns)
        gaps = request.gaps_ns
        self._histograms["inter_token_latency_seconds"].observe_all(gaps)
        if gaps:
            self._observe("request_time_per_output_token_seconds", sum(gaps) // len(gaps))
