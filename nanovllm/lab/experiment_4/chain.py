"""The causal chain, held against the runs: where it could have failed, and whether it did.

    longer context -> more residency -> fewer live requests -> longer wait -> worse TTFT

What it is: five links read off the base arm, and interventions on the pool alone. What it
knows nothing about: files, wording. Invariants: what would refute each part is fixed here,
before any run; a part that fails makes the chain `refuted`, and where the pool never was the
wall it is `not tested`; it is never left out. Changes are paired, the same request with the
same tokens once on either pool, and averaged: with a pool that is too small some wait long and some not at all.

    A link holds where the figure of long_ctx stands to short_ctx's as the chain says.
    An intervention (each case that waited for blocks in `base`, on the roomy pool; and the reverse, short_ctx
    on the tight pool) holds where all of these do:
      wall      with the small pool blocks were waited for, with the large one they never were
      queue     T_queue falls in every repeat, and by more than runs of one arm differ
      prefill   T_prefill stays: its change is at most PREFILL_SHARE of T_queue's, or at most what two runs of
                one arm differ by, whichever is more; and in any case at most SELF_SHARE of T_prefill itself
      ttft      TTFT falls in every repeat
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any

from nanovllm.lab.experiment_4.cases import CASES

HOLDS, REFUTED, NOT_TESTED = "holds", "refuted", "not tested"
PREFILL_SHARE, SELF_SHARE = 0.1, 0.5
TERMS = ("T_queue", "T_prefill", "TTFT")
LINKS = (  # name, how to read it off a row of the capacity table, and whether it grows along the chain
    ("context", lambda row: row["prompt_len"]["value"][-1], True),
    ("residency", lambda row: row["estimated_kv"]["per_request"][-1]["block_exact_bytes"], True),
    ("live_requests", lambda row: row["live_requests"]["max"], False),
    ("queue_wait", lambda row: row["queue_wait"]["p50"], True),
    ("TTFT", lambda row: row["TTFT"]["p50"], True),
)
Terms = Mapping[str, Mapping[str, int]]  # request id -> term -> nanoseconds


def make_chain(rows: list[dict[str, Any]], terms: Mapping[str, Terms], table: list[dict[str, Any]]) -> dict[str, Any]:
    """The chain as plain data. `terms` holds each run's requests, by the run's name."""
    links = [_link(name, read(table[0]), read(table[1]), grows) for name, read, grows in LINKS]
    interventions = [_intervention(case, "base", "roomy", rows, terms) for case in CASES]
    reverse = _intervention("short_ctx", "tight", "base", rows, terms)
    tried = [one for one in interventions if one["is_wall"]]
    is_tested = any(one["case"] == "long_ctx" for one in tried) and reverse["is_wall"]
    holds = all(link["holds"] for link in links) and all(one["verdict"] == HOLDS for one in (*tried, reverse))
    return {
        "verdict": NOT_TESTED if not is_tested else HOLDS if holds else REFUTED,
        "links": links,
        "interventions": interventions,
        "reverse": reverse,
        "prefill_share": PREFILL_SHARE,
        "self_share": SELF_SHARE,
    }


def _link(name: str, short: float, long: float, grows: bool) -> dict[str, Any]:
    return {"link": name, "short_ctx": short, "long_ctx": long, "holds": long > short if grows else long < short}


def _intervention(
    case: str, small: str, large: str, rows: list[dict[str, Any]], terms: Mapping[str, Terms]
) -> dict[str, Any]:
    """One case on two pools that differ in their block count alone."""
    of_small, of_large = (_repeats(rows, arm, case) for arm in (small, large))
    pools = [_pool(arm, of_arm) for arm, of_arm in ((small, of_small), (large, of_large))]
    a, b = ([terms[row["run"]] for row in of_arm] for of_arm in (of_small, of_large))
    changes = {term: _change(a, b, term, of_small[0]["label"]) for term in TERMS}
    queue, prefill = changes["T_queue"], changes["T_prefill"]
    bound = _prefill_bound(queue, prefill)
    is_wall = pools[0]["pool_waits"] > 0
    tests = {
        "wall": is_wall and pools[1]["pool_waits"] == 0,
        "queue": max(queue["change_of_repeats"]) < 0 and -queue["change"] > queue["same_arm"],
        "prefill": abs(prefill["change"]) <= bound["ms"],
        "ttft": max(changes["TTFT"]["change_of_repeats"]) < 0,
    }
    verdict = NOT_TESTED if not is_wall else HOLDS if all(tests.values()) else REFUTED
    sides = {"small_pool": pools[0], "large_pool": pools[1]}
    judged = {"prefill_bound": bound, "tests": tests, "verdict": verdict}
    return {"case": case, **sides, "is_wall": is_wall, **changes, **judged}


def _prefill_bound(queue: dict[str, Any], prefill: dict[str, Any]) -> dict[str, Any]:
    """How far T_prefill may change and still be said to stay, milliseconds, and which of the three bounds that is."""
    share, noise = PREFILL_SHARE * abs(queue["change"]), prefill["same_arm"]
    found = {"ms": round(max(share, noise), 3), "of": "T_queue" if share >= noise else "same_arm"}
    most = round(SELF_SHARE * prefill["small_pool"], 3)
    return {"ms": most, "of": "T_prefill"} if most < found["ms"] else found


def _pool(arm: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"arm": arm, "num_blocks": rows[0]["num_blocks"], "pool_waits": sum(row["pool_waits"] for row in rows)}


def _repeats(rows: list[dict[str, Any]], arm: str, case: str) -> list[dict[str, Any]]:
    return sorted((row for row in rows if (row["arm"], row["case"]) == (arm, case)), key=lambda row: int(row["repeat"]))


def _change(small: Sequence[Terms], large: Sequence[Terms], term: str, label: str) -> dict[str, Any]:
    """From the small pool to the large one, milliseconds. `same_arm`: the most that two runs of one arm differ."""
    changes = [_paired_ms(a, b, term) for a, b in zip(small, large, strict=True)]
    same = [abs(_paired_ms(a, b, term)) for arm in (small, large) for a, b in combinations(arm, 2)]
    return {
        "small_pool": _mean_ms(small, term),
        "large_pool": _mean_ms(large, term),
        "change": median(changes),
        "change_of_repeats": changes,
        "same_arm": max(same, default=0.0),
        "unit": "ms",
        "label": label,
    }


def _paired_ms(a: Terms, b: Terms, term: str) -> float:
    """Mean over the requests of what the term changes by for one and the same request."""
    return round(fmean(b[name][term] - a[name][term] for name in a) / 1e6, 3)


def _mean_ms(runs: Sequence[Terms], term: str) -> float:
    """Mean over all requests of all repeats."""
    return round(fmean(request[term] for run in runs for request in run.values()) / 1e6, 3)
