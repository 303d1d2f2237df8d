"""The result statement: which figures are observation only, which are a real effect, which are not yet either.

What it is: the sheet's part 12.6 as data, fixed before any run. What it knows nothing about:
the figures. Invariants: every figure of the tables stands in exactly one class; what a probe
saw stands in `observation_only` and nowhere else.
"""

from __future__ import annotations

from typing import Any

from nanovllm.observe.probe import STATEMENT

CLASSES = ("observation_only", "real_effect", "not_yet")
PROBE_FIGURES = ("probe.overlap_tokens", "probe.overlap_share")


def make_statement(label: str) -> dict[str, Any]:
    """The three classes. On a virtual clock nothing was measured, so that no effect is real yet."""
    effects = ["chain.interventions.T_queue", "chain.interventions.TTFT", "chain.reverse.T_queue"]
    is_real = label == "measured"
    return {
        "observation_only": [*PROBE_FIGURES, "estimated_kv", "live_requests", "total_blocks"],
        "real_effect": effects if is_real else [],
        "not_yet": ["a gain from prefix reuse", "larger models, other machines", *([] if is_real else effects)],
        "probe": STATEMENT,
    }
