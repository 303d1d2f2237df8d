"""The causal chain judged: what refutes it does, and what was never tried is not called true."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.core.cost_table import CostTable
from nanovllm.lab.experiment_4.chain import HOLDS, NOT_TESTED, REFUTED, make_chain

MS = 10**6
ARMS = [("base", case) for case in ("short_ctx", "long_ctx", "mixed_ctx")]
ARMS += [("roomy", case) for _, case in ARMS] + [("tight", "short_ctx")]
BLOCKS = {"base": 100, "roomy": 400, "tight": 20}


def told(**changed: Any) -> dict[str, Any]:
    """The chain of made-up runs: `terms` (T_queue, T_prefill) in ms and `waits` for blocks by arm and case."""
    terms: dict[tuple[str, str], tuple[float, float]] = dict.fromkeys(ARMS, (0, 30))
    terms |= {("base", "long_ctx"): (900, 200), ("roomy", "long_ctx"): (5, 205)}
    terms |= {("base", "mixed_ctx"): (400, 100), ("roomy", "mixed_ctx"): (5, 101), ("tight", "short_ctx"): (300, 30)}
    terms |= changed.get("terms", {})
    waits = {("base", "long_ctx"): 5, ("base", "mixed_ctx"): 4, ("tight", "short_ctx"): 3} | changed.get("waits", {})
    noise = changed.get("noise", 0.0)
    rows, by_run = [], {}
    for repeat in (1, 2, 3):
        for arm, case in ARMS:
            name = f"{arm}-{case}-{repeat}"
            row = {"run": name, "arm": arm, "case": case, "repeat": repeat, "label": "simulated"}
            rows.append({**row, "num_blocks": BLOCKS[arm], "pool_waits": waits.get((arm, case), 0)})
            queue, prefill = terms[arm, case]
            queue += noise * repeat
            prefill += changed.get("prefill_noise", {}).get((arm, case), (0, 0, 0))[repeat - 1]
            times = {"T_queue": queue, "T_prefill": prefill, "TTFT": queue + prefill}
            by_run[name] = {i: {term: int(ms * MS) for term, ms in times.items()} for i in ("a", "b")}
    return make_chain(rows, by_run, changed.get("table", table()))


def table(**long_ctx: float) -> list[dict[str, Any]]:
    def row(length: int, size: int, live: float, queue: float, ttft: float) -> dict[str, Any]:
        return {
            "prompt_len": {"value": [length]},
            "estimated_kv": {"per_request": [{"block_exact_bytes": size}]},
            "live_requests": {"max": live},
            "queue_wait": {"p50": queue},
            "TTFT": {"p50": ttft},
        }

    long = {"length": 512, "size": 32, "live": 3, "queue": 900, "ttft": 1100} | long_ctx
    return [row(64, 4, 8, 0, 30), row(**long)]  # type: ignore[arg-type]


def test_it_holds_where_the_wait_falls_and_prefill_stays() -> None:
    chain = told()
    assert chain["verdict"] == HOLDS
    assert [one["verdict"] for one in chain["interventions"]] == [NOT_TESTED, HOLDS, HOLDS]
    assert chain["reverse"]["verdict"] == HOLDS and chain["reverse"]["small_pool"]["arm"] == "tight"
    assert chain["interventions"][1]["T_queue"]["change"] == -895.0


@pytest.mark.parametrize(
    ("changed", "test"),
    [
        ({"terms": {("roomy", "long_ctx"): (900, 200)}}, "queue"),
        ({"terms": {("roomy", "long_ctx"): (950, 200)}}, "queue"),
        ({"terms": {("roomy", "long_ctx"): (5, 20)}}, "prefill"),  # it was the prefill, not the wait
        ({"terms": {("roomy", "long_ctx"): (5, 400)}}, "prefill"),
        ({"terms": {("roomy", "long_ctx"): (850, 400)}}, "ttft"),
        ({"waits": {("roomy", "long_ctx"): 1}}, "wall"),  # they waited for blocks there too
        ({"noise": 500.0}, "queue"),  # runs of one arm differ by more than the arms
        (
            {"terms": {("base", "long_ctx"): (9000, 200), ("roomy", "long_ctx"): (5, 310)}},
            "prefill",
        ),  # over half itself
    ],
)
def test_each_test_refutes_it(changed: dict[str, Any], test: str) -> None:
    chain = told(**changed)
    one = chain["interventions"][1]
    assert chain["verdict"] == REFUTED and one["verdict"] == REFUTED and not one["tests"][test]


@pytest.mark.parametrize(
    ("terms", "noise", "bound"),
    [
        ((5, 205), (0, 0, 0), {"ms": 89.5, "of": "T_queue"}),
        ((5, 110), (0, 95, -5), {"ms": 100.0, "of": "same_arm"}),  # a change of -90 where repeats differ by 100
        ((5, 110), (0, 300, 0), {"ms": 100.0, "of": "T_prefill"}),  # noise excuses no more than half of it
    ],
)
def test_prefill_stays_within_a_bound_that_is_named(
    terms: tuple[float, float], noise: tuple[float, ...], bound: dict[str, Any]
) -> None:
    one = told(terms={("roomy", "long_ctx"): terms}, prefill_noise={("roomy", "long_ctx"): noise})["interventions"][1]
    assert one["prefill_bound"] == bound and one["tests"]["prefill"]


def test_the_reverse_arm_refutes_it_too() -> None:
    chain = told(terms={("tight", "short_ctx"): (0, 300)})
    assert chain["verdict"] == REFUTED and not chain["reverse"]["tests"]["queue"]


@pytest.mark.parametrize("link", [{"length": 64}, {"size": 4}, {"live": 8}, {"queue": 0}, {"ttft": 30}])
def test_a_broken_link_refutes_it(link: dict[str, float]) -> None:
    assert told(table=table(**link))["verdict"] == REFUTED


@pytest.mark.parametrize("arm", [("base", "long_ctx"), ("tight", "short_ctx")])
def test_without_a_wall_nothing_was_tested(arm: tuple[str, str]) -> None:
    assert told(waits={arm: 0})["verdict"] == NOT_TESTED


def test_more_blocks_change_nothing_where_prefill_is_what_all_wait_for() -> None:
    """The real scheduler with a slow prefill and a pool that holds everybody: what the intervention has to see."""
    from nanovllm.lab.experiment_4.cases import ENGINE, QUICK
    from nanovllm.lab.experiment_4.figures import request_terms
    from nanovllm.lab.simulated import simulated_engine
    from nanovllm.lab.workload_run import run_workload
    from nanovllm.observe.paths import replay
    from nanovllm.observe.recording import Recording
    from tests.observe.recorded import HEADER

    terms = {}
    for blocks in (QUICK.roomy_blocks, 2 * QUICK.roomy_blocks):
        engine = simulated_engine(blocks, costs=CostTable(base_ms=1.0, per_new_ms=5.0), **ENGINE)
        run_workload(engine, QUICK.workload("long_ctx", 0, 256))
        recording = Recording(HEADER)
        for event in engine.events.reader(from_start=True).poll():
            recording.add(event)
        terms[blocks] = request_terms(replay(recording))
    small, large = terms.values()
    assert small == large and max(one["T_queue"] for one in small.values()) > 0
