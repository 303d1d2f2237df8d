"""The causal chain, held against the runs: where it could have failed, and whether it did.

    longer context -> more residency -> fewer live requests -> longer wait -> worse TTFT

What it is: five links read off the base arm, and two interventions on the pool alone. What
it knows nothing about: recordings, wording. Invariants: what would refute each part is fixed
here, before any run; a part that fails makes the chain `refuted`, one that could not be tried
(the pool never was the wall) makes it `not tested`; it is never left out.

    A link holds where the figure of long_ctx stands to short_ctx's as the chain says.
    Roomy (for each case that waited for blocks in `base`) and tight, the reverse:
      wall      blocks were waited for with the small pool, and not with the large one
      queue     T_queue is smaller with the large pool in every repeat, and by more than both arms differ from themselves
      prefill   T_prefill stays: its change is at most PREFILL_SHARE of T_queue's
      ttft      TTFT is smaller with the large pool in every repeat
"""

from __future__ import annotations

from statistics import median
from typing import Any

from nanovllm.lab.experiment_4.cases import CASES

HOLDS, REFUTED, NOT_TESTED = "holds", "refuted", "not tested"
PREFILL_SHARE = 0.1
LINKS = (  # name, how to read it off a row of the capacity table, and whether it grows along the chain
    ("context", lambda row: row["prompt_len"]["value"][-1], True),
    ("residency", lambda row: row["estimated_kv"]["per_request"][-1]["block_exact_bytes"], True),
    ("live_requests", lambda row: row["live_requests"]["max"], False),
    ("queue_wait", lambda row: row["queue_wait"]["p50"], True),
    ("TTFT", lambda row: row["TTFT"]["p50"], True),
)


def make_chain(rows: list[dict[str, Any]], table: list[dict[str, Any]]) -> dict[str, Any]:
    """The chain as plain data."""
    links = [_link(name, read(table[0]), read(table[1]), grows) for name, read, grows in LINKS]
    interventions = [_intervention(case, "base", "roomy", rows) for case in CASES]
    reverse = _intervention("short_ctx", "tight", "base", rows)
    tried = [one for one in interventions if one["is_wall"]]
    verdicts = [link["holds"] for link in links] + [one["verdict"] == HOLDS for one in (*tried, reverse)]
    is_tested = any(one["case"] == "long_ctx" for one in tried) and reverse["is_wall"]
    return {
        "verdict": NOT_TESTED if not is_tested else HOLDS if all(verdicts) else REFUTED,
        "links": links,
        "interventions": interventions,
        "reverse": reverse,
        "prefill_share": PREFILL_SHARE,
    }


def _link(name: str, short: float, long: float, grows: bool) -> dict[str, Any]:
    return {"link": name, "short_ctx": short, "long_ctx": long, "holds": long > short if grows else long < short}


def _intervention(case: str, small: str, large: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One case on two pools that differ in their block count alone."""
    with_small, with_large = (_repeats(rows, arm, case) for arm in (small, large))
    waits = [sum(row["pool_waits"] for row in runs) for runs in (with_small, with_large)]
    queue, prefill, ttft = (_change(with_small, with_large, name) for name in ("queue_ms", "prefill_ms", "ttft_ms"))
    tests = {
        "wall": waits[0] > 0 and waits[1] == 0,
        "queue": queue["falls_in_every_repeat"] and -queue["change"] > queue["same_arm"],
        "prefill": abs(prefill["change"]) <= PREFILL_SHARE * abs(queue["change"]),
        "ttft": ttft["falls_in_every_repeat"],
    }
    is_wall = waits[0] > 0
    return {
        "case": case,
        "small_pool": {"arm": small, "num_blocks": with_small[0]["num_blocks"], "pool_waits": waits[0]},
        "large_pool": {"arm": large, "num_blocks": with_large[0]["num_blocks"], "pool_waits": waits[1]},
        "is_wall": is_wall,
        "T_queue": queue,
        "T_prefill": prefill,
        "TTFT": ttft,
        "tests": tests,
        "verdict": NOT_TESTED if not is_wall else HOLDS if all(tests.values()) else REFUTED,
    }


def _repeats(rows: list[dict[str, Any]], arm: str, case: str) -> list[dict[str, Any]]:
    return sorted((row for row in rows if (row["arm"], row["case"]) == (arm, case)), key=lambda row: int(row["repeat"]))


def _change(small: list[dict[str, Any]], large: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Medians in milliseconds with either pool; `same_arm` is the most that runs of one arm differ."""
    a, b = ([float(row[name]["p50"]) for row in runs] for runs in (small, large))
    return {
        "small_pool": median(a),
        "large_pool": median(b),
        "change": round(median(b) - median(a), 3),
        "same_arm": round(max(max(a) - min(a), max(b) - min(b)), 3),
        "falls_in_every_repeat": all(y < x for x, y in zip(a, b, strict=True)),
        "unit": "ms",
        "label": small[0]["label"],
    }
