"""ServerMetrics: one engine's reports, and its server's answers, as Prometheus metrics.

What it is: the listener that turns `StepReport`s into the plain values of
`observe/metrics.py`, and the task that measures the event loop. What it knows nothing
about: names, buckets, HTTP. Invariants: everything here runs on the event loop and costs
a step microseconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.messages import EngineStats, Finished, StepReport, Timings
from nanovllm.observe.instruments import Histogram
from nanovllm.observe.metrics import Ended, EngineMetrics, Reading

LAG_PERIOD_S = 0.1


class ServerMetrics:
    """Counts one engine and its server. Make it before the engine starts."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        prefix: str = "nanovllm",
        model_name: str | None = None,
        rejections: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._engine = engine
        self._metrics = EngineMetrics(prefix, model_name or engine.config.model, self._read, rejections)
        engine.listeners.append(self._hear)

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        if hasattr(self._engine, "info"):
            self._metrics.loaded(**_cache_labels(self._engine))
        return self._metrics.render()

    def answered(self, status: int) -> None:
        """An HTTP request was answered with `status`."""
        self._metrics.answered(status)

    @property
    def loop_lag(self) -> Histogram:
        """For `measure_loop_lag`."""
        return self._metrics.loop_lag

    def _hear(self, report: StepReport) -> None:
        self._metrics.stepped(_reading(report.stats), sum(len(delta.token_ids) for delta in report.deltas))
        looks_up = self._engine.info.prefix_mode != "off"
        for finished in report.finished:
            self._metrics.ended(_ended(finished, looks_up))

    def _read(self) -> Reading:
        has_started = hasattr(self._engine, "info")
        return _reading(self._engine.stats, self._engine.info.block_bytes if has_started else 0)


async def measure_loop_lag(histogram: Histogram) -> None:
    """Every 100 ms, how late the loop came back; until cancelled."""
    period_ns = round(LAG_PERIOD_S * 1e9)
    while True:
        due_ns = time.monotonic_ns() + period_ns
        await asyncio.sleep(LAG_PERIOD_S)
        histogram.observe(max(0, time.monotonic_ns() - due_ns))


def _cache_labels(engine: AsyncEngine) -> dict[str, object]:
    """Labels as vLLM has them: gateways read block size and block count off them."""
    info = engine.info
    return {
        "block_size": info.block_size,
        "num_gpu_blocks": info.num_blocks,
        "enable_prefix_caching": info.prefix_mode == "reuse",
        "cache_dtype": info.dtype,
    }


def _reading(stats: EngineStats, block_bytes: int = 0) -> Reading:
    return Reading(
        running=stats.running,
        waiting=stats.waiting + stats.loading,
        num_blocks=stats.num_blocks,
        free_blocks=stats.free_blocks,
        cached_blocks=stats.cached_blocks,
        block_bytes=block_bytes,
        live_requests=stats.live_requests,
        prefilling_requests=stats.prefilling_requests,
        table_entries=stats.table_entries,
        steps=stats.steps,
        preemptions=stats.preemptions,
        prefill_tokens=stats.prefill_tokens,
        decode_tokens=stats.decode_tokens,
        events_dropped=stats.events_dropped,
        state=stats.state,
        tiers=stats.tiers,
    )


def _ended(finished: Finished, looks_up: bool) -> Ended:
    """A finished request in plain values, its phases cut where vLLM cuts them."""
    timings = finished.timings or Timings(arrival_ns=0)
    has_first = timings.t_prefill_ns is not None
    return Ended(
        reason=_reason(finished),
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        longest_answer=finished.longest_completion,
        queried_tokens=finished.prompt_tokens if looks_up else 0,
        cached_tokens=finished.cached_tokens,
        cached_by_tier=finished.hit_tokens_by_tier,
        queue_ns=timings.t_queue_ns,
        prefill_ns=(timings.t_schedule_ns or 0) + (timings.t_prefill_ns or 0) if has_first else None,
        ttft_ns=timings.ttft_ns,
        decode_ns=_decode_ns(timings) if has_first else None,
        end_to_end_ns=timings.end_to_end_ns,
        gaps_ns=timings.decode_gaps_ns,
    )


def _decode_ns(timings: Timings) -> int:
    """From the first sampled token to the last: the gaps are counted from the first hand-over, so T_return is added."""
    gaps = timings.decode_gaps_ns
    return sum(gaps) + (timings.t_return_ns or 0) if gaps else 0


def _reason(finished: Finished) -> str:
    """How a request ended, in one word: what went wrong with any of its samples, else how the first one ended."""
    if finished.error is not None:
        return "error"
    reasons = finished.finish_reasons
    return next((bad for bad in ("error", "abort") if bad in reasons), reasons[0] if reasons else "abort")
