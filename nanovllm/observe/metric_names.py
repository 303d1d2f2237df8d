"""The names, texts and buckets of the metrics: vLLM's, without their prefix.

What it is: tables. What it knows nothing about: values. Invariant: a dashboard made for
vLLM finds under these names what it expects; `_total` is appended to a counter's name
when it is exported.
"""

from __future__ import annotations

NS = 10**9
PREFILLED = "prefilled"
REASONS = ("stop", "length", "abort", "error", PREFILLED)
REJECTIONS = ("server_overloaded", "rate_limit_exceeded")  # there from the start, so that rate() sees the first one

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
          160.0, 640.0, 2560.0)  # fmt: skip
GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
PHASE_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
           1920.0, 7680.0)  # fmt: skip
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REQUEST_TOKENS = (*(m * 10**e for e in range(6) for m in (1, 2, 5)), 10**6)

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...], int]] = {
    "time_to_first_token_seconds": ("From a request's arrival to the hand-over of its first token.", TTFT_S, NS),
    "inter_token_latency_seconds": ("Time between two tokens of one answer.", GAP_S, NS),
    "request_time_per_output_token_seconds": ("Mean of the inter-token latencies of one request.", GAP_S, NS),
    "e2e_request_latency_seconds": ("From a request's arrival to its last token.", PHASE_S, NS),
    "request_queue_time_seconds": ("From a request's arrival until it was scheduled.", PHASE_S, NS),
    "request_prefill_time_seconds": ("From being scheduled to the first sampled token.", PHASE_S, NS),
    "request_decode_time_seconds": ("From the first sampled token to the last.", PHASE_S, NS),
    "request_inference_time_seconds": ("From being scheduled to the last token.", PHASE_S, NS),
    "request_prompt_tokens": ("Prompt tokens of a request.", REQUEST_TOKENS, 1),
    "request_generation_tokens": ("Generated tokens of a request.", REQUEST_TOKENS, 1),
    "request_max_num_generation_tokens": ("Tokens of the longest answer of a request.", REQUEST_TOKENS, 1),
    "iteration_tokens_total": ("Tokens of one engine step.", STEP_TOKENS, 1),
    "loop_lag_seconds": ("How late the server's event loop woke up.", LAG_S, NS),
}
READ_FROM_ENGINE: dict[str, str] = {  # counters that the engine keeps, by the field of `Reading` they come from
    "preemptions": "num_preemptions",
    "prefill_tokens": "prompt_tokens",
    "events_dropped": "event_bus_dropped",
}
COUNTERS: dict[str, str] = {
    "num_preemptions": "Times a running request had to give its KV blocks back.",
    "prompt_tokens": "Prompt tokens computed; those found in the cache are not among them.",
    "event_bus_dropped": "Events that readers of the bus were too slow to see.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked for in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_aborted_requests": "Requests that their client, or a deadline, ended.",
}

# the state plane's facts and how they are called as outcomes
LOADS = {"loads": "ended", "loads_failed": "failed", "loads_refused": "refused", "loads_cancelled": "cancelled"}
SPILLS = {"spilled_blocks": "written", "spills_dropped": "dropped"}
