"""Diagnosis: each built cause is named and nothing else; mixtures are mixtures; a healthy run has no dominant cause."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.events import WaitEvent
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.attribution import CLASSES, WORK, Attribution
from nanovllm.observe.diagnosis import DOMINANT, HEALTHY, MIXED, diagnose
from nanovllm.observe.paths import replay
from nanovllm.observe.recording import read_recording
from nanovllm.observe.records import to_record
from nanovllm.observe.run_summary import summary
from nanovllm.observe.wording import PROSE
from tests.engine.helpers import make_bench
from tests.observe.causes import ALONE, MS, ONE_CAUSE, TWO_CAUSES, WALL, every, request
from tests.observe.recorded import record


def named(found: dict[str, Any]) -> list[str]:
    return [cause["cause"] for cause in found["causes"] if cause["is_named"]]


@pytest.mark.parametrize("name", [*ONE_CAUSE, *TWO_CAUSES])
def test_a_built_cause_is_named_with_its_evidence(name: str, tmp_path: Path) -> None:
    built = (ONE_CAUSE | TWO_CAUSES)[name]
    run = built.run(tmp_path)
    found = diagnose(run, request=built.request)
    assert tuple(named(found)) == built.causes
    assert found["verdict"] == (HEALTHY, DOMINANT, MIXED)[len(built.causes)] and found["label"] == "simulated"
    records = {event.seq: to_record(event) for event in run.recording.events}
    for cause in found["causes"]:
        assert cause["evidence"] or not cause["is_named"]
        for row in cause["evidence"]:
            told = {key: list(v) if isinstance(v, tuple) else v for key, v in row["told"].items()}
            assert told.items() <= {"tokens": 0, "sample": 0, **records[row["record"]]}.items()
            assert 0 < row["explains_ns"] <= cause["time_ns"]
    if built.behind is not None:
        assert built.behind in [culprit["request"] for culprit in found["causes"][0]["behind"]]


@pytest.mark.parametrize(
    "cap", [("max_new_requests_per_step", 1), ("max_num_batched_tokens", 128), ("max_num_seqs", 3)]
)
def test_a_cap_whose_lifting_changes_no_wait_is_not_the_cause(cap: tuple[str, int], tmp_path: Path) -> None:
    """The refutation, carried out: the queue waits as long without the cap, so blocks are named with it and without."""
    waits: list[float] = []
    arms: list[dict[str, Any]] = [{cap[0]: cap[1]}, {}]
    for number, knobs in enumerate(arms):
        bench = make_bench(simulated=True, vocab_size=256, **WALL, **knobs)
        record(bench, every(0, 12, 512, 200), tmp_path / f"{number}.jsonl")
        run = replay(read_recording(tmp_path / f"{number}.jsonl"))
        assert named(diagnose(run)) == ["blocks_exhausted"]
        waits.append(summary(run)["latency_ms"]["queue"]["p50"])
    assert waits[0] == pytest.approx(waits[1], rel=0.01) and waits[1] > 1000


def test_every_cause_is_built_once_and_can_be_told() -> None:
    built = {cause for workload in (ONE_CAUSE | TWO_CAUSES).values() for cause in workload.causes}
    assert set(CLASSES) - built == {"not_told"}
    for cause in CLASSES:
        assert f"cause_{cause}" in PROSE and f"refute_{cause}" in PROSE


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 25), st.integers(1, 9)), min_size=1, max_size=8),
    st.sampled_from(["mixed", "separate"]),
    st.sampled_from(["fcfs", "sjf"]),
    st.integers(10, 40),
    st.sampled_from([None, 2]),
)
def test_a_life_is_cut_without_gap_or_overlap(
    work: list[tuple[int, int, int]], mode: str, policy: str, num_blocks: int, new: int | None
) -> None:
    """Shares of time are shares of all of it, whatever happened."""
    knobs = {"mode": mode, "policy": policy, "max_num_seqs": 3, "max_new_requests_per_step": new}
    bench = make_bench(num_blocks=num_blocks, simulated=True, vocab_size=256, max_prefill_chunk=7, **knobs)
    arrivals = [(at * MS, request(i, length, tokens)) for i, (at, length, tokens) in enumerate(work)]
    with TemporaryDirectory() as folder:
        record(bench, arrivals, Path(folder) / "run.jsonl", policy=policy)
        run = replay(read_recording(Path(folder) / "run.jsonl"))
    attribution = Attribution(run)
    for name, path in run.paths.items():
        pieces = sorted(attribution.pieces[name])
        assert pieces[0].start_ns == path.timeline.arrival_ns
        assert pieces[-1].end_ns == path.timeline.last_handover_ns
        assert all(a.end_ns == b.start_ns for a, b in pairwise(pieces))
        assert {piece.cause for piece in pieces} <= {*CLASSES, WORK}
    found = diagnose(run)
    shares = found["work_share"] + sum(cause["share"] for cause in found["causes"])
    assert shares == pytest.approx(1, abs=0.01)


def test_a_wait_that_no_record_explains_is_not_explained(tmp_path: Path) -> None:
    """The bus forgot the refusals: the wait is there, and nobody is blamed for it."""
    ONE_CAUSE["batch_cap"].run(tmp_path)
    recording = read_recording(tmp_path / "run.jsonl")
    recording.events = [event for event in recording.events if not isinstance(event, WaitEvent)]
    found = diagnose(replay(recording))
    assert named(found) == ["not_told"] and found["causes"][0]["behind"] == []


def test_a_window_is_judged_by_itself(tmp_path: Path) -> None:
    """Healthy first, a burst later: the whole run's mean hides neither."""
    built = ONE_CAUSE["all_at_once"]
    late = [(at + 8000 * MS, {**one, "request_id": f"late{i}"}) for i, (at, one) in enumerate(built.arrivals)]
    bench = make_bench(simulated=True, vocab_size=256, num_blocks=512, **built.knobs)
    record(bench, [*ALONE, *late], tmp_path / "run.jsonl")
    run = replay(read_recording(tmp_path / "run.jsonl"))
    assert diagnose(run, to_ns=7900 * MS)["verdict"] == HEALTHY
    assert set(named(diagnose(run, from_ns=7900 * MS))) == {"arrival_burst", "batch_cap"}


def test_a_slow_request_in_a_healthy_run_is_an_outlier(tmp_path: Path) -> None:
    bench = make_bench(simulated=True, vocab_size=256, num_blocks=512)
    long = [(2000 * MS, request(90, 900, 2)), (2001 * MS, request(91, 4, 2))]
    record(bench, [*every(120, 15, 8, 60), *long], tmp_path / "run.jsonl")
    found = diagnose(replay(read_recording(tmp_path / "run.jsonl")))
    assert found["verdict"] == HEALTHY
    assert {row["request"]: row["causes"] for row in found["outliers"]} == {"r90": ["prefill"], "r91": ["long_step"]}


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    run = ONE_CAUSE["prefill"].run(tmp_path)
    with pytest.raises(InvalidRequestError, match="no request 'nobody'"):
        diagnose(run, request="nobody")
    with pytest.raises(InvalidRequestError, match="window is empty"):
        diagnose(run, from_ns=5, to_ns=5)
    with pytest.raises(InvalidRequestError, match=r"The run's requests lived from 0.000 s to \d.\d{3} s: nothing"):
        diagnose(run, from_ns=900 * 10**9, to_ns=1000 * 10**9)
    with pytest.raises(InvalidRequestError, match=r"The run's requests lived from 0.000 s"):
        diagnose(run, from_ns=900 * 10**9)
    with pytest.raises(InvalidRequestError, match=r"Request 'r3' lived from 0.900 s"):
        diagnose(run, request="r3", to_ns=10**6)


def test_an_empty_recording_has_no_dominant_cause(tmp_path: Path) -> None:
    bench = make_bench(simulated=True)
    record(bench, [], tmp_path / "run.jsonl")
    assert diagnose(replay(read_recording(tmp_path / "run.jsonl")))["verdict"] == HEALTHY
