"""Scheduling decisions replay identically: a refactor changes none of them, a new policy is seen."""

from __future__ import annotations

import json

import pytest

from tests.engine.golden import FOLDER, WORKLOADS, as_text, trace


@pytest.mark.parametrize("name", WORKLOADS)
def test_decisions_replay(name: str) -> None:
    wanted = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    got = as_text(trace(WORKLOADS[name])).splitlines()
    for step, (a, b) in enumerate(zip(wanted, got, strict=False)):
        assert json.loads(a) == json.loads(b), f"step {step} decides otherwise; see tests/engine/golden.py"
    assert len(got) == len(wanted)


def test_the_workloads_show_what_they_are_for() -> None:
    """A trace that never preempts would prove nothing about preemption."""
    steps = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in FOLDER.glob("*.jsonl")}
    assert set(steps) == set(WORKLOADS)
    for name in ("preemption_pressure", "preemption_by_priority"):
        assert any(step["preempted"] for step in steps[name])
    for step in steps["separate"]:
        assert len({tokens > 1 for _, tokens in step["run"]}) <= 1 or len(step["admitted"]) > 0
    assert all(len(step["admitted"]) <= 1 for step in steps["one_new_request_per_step"])
    assert max(tokens for step in steps["chunked"] for _, tokens in step["run"]) == 5
    assert all(sum(tokens for _, tokens in step["run"]) <= 8 for step in steps["chunked"])
