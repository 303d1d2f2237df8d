"""The Chrome trace: valid by the Trace Event Format, with tracks for requests, steps and the pool, whatever ran."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.observe.paths import Replay, replay
from nanovllm.observe.perfetto import POOL, STEPS, chrome_trace
from nanovllm.observe.recording import read_recording
from tests.engine.helpers import make_bench
from tests.observe.causes import MS, ONE_CAUSE, request
from tests.observe.recorded import record

# Google, "Trace Event Format": the fields that each phase must have, and no others of ours.
FIELDS = {
    "M": {"ph", "name", "pid", "tid", "args"},
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"ph", "name", "pid", "tid", "ts", "args"},
    "b": {"ph", "name", "cat", "id", "pid", "tid", "ts", "args"},
    "e": {"ph", "name", "cat", "id", "pid", "tid", "ts"},
}


def check_schema(document: dict[str, Any]) -> None:
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    for event in document["traceEvents"]:
        assert set(event) == FIELDS[event["ph"]], event
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["name"], str)
        assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())


def check_nesting(document: dict[str, Any]) -> None:
    """Of each request every begin has its end, not before it, and the outermost slice is the request."""
    tracks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] in "be":
            tracks[event["id"]].append(event)
    for events in tracks.values():
        begins, ends = events[::2], events[1::2]
        assert [b["name"] for b in begins] == [e["name"] for e in ends]
        assert all(b["ph"] == "b" and e["ph"] == "e" and b["ts"] <= e["ts"] for b, e in zip(begins, ends, strict=True))
        assert all(b["ts"] >= begins[0]["ts"] and e["ts"] <= ends[0]["ts"] for b, e in zip(begins, ends, strict=True))


def of(document: dict[str, Any], phase: str, pid: int) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event["ph"] == phase and event["pid"] == pid]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 25), st.integers(1, 9)), max_size=6), st.integers(10, 40))
def test_every_run_is_a_valid_trace(work: list[tuple[int, int, int]], num_blocks: int) -> None:
    bench = make_bench(num_blocks=num_blocks, simulated=True, vocab_size=256, max_prefill_chunk=7)
    arrivals = [(at * MS, request(i, length, tokens)) for i, (at, length, tokens) in enumerate(work)]
    with TemporaryDirectory() as folder:
        record(bench, arrivals, Path(folder) / "run.jsonl")
        run = replay(read_recording(Path(folder) / "run.jsonl"))
    document = chrome_trace(run)
    check_schema(document)
    check_nesting(document)
    check_tracks(run, document)


def check_tracks(run: Replay, document: dict[str, Any]) -> None:
    """Requests, steps, blocks: as many slices as there were, and levels that make up the pool."""
    header = run.recording.header
    steps = of(document, "X", STEPS)
    assert [step["args"]["record"] for step in steps] == [step.event.seq for step in run.steps]
    assert all(step["args"]["label"] == header.label == "simulated" for step in steps)
    roots = {event["name"] for event in of(document, "b", STEPS) if event["args"]}
    assert roots == set(run.paths)
    pool = [event["args"] for event in of(document, "C", POOL) if event["name"] == "blocks"]
    assert len(pool) == len(run.steps)
    assert all(sum(level.values()) == header.num_blocks and min(level.values()) >= 0 for level in pool)
    assert {event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"} == {
        "engine steps",
        "block pool and queue",
    }


def test_a_preempted_request_shows_its_wait(tmp_path: Path) -> None:
    document = chrome_trace(ONE_CAUSE["preemption"].run(tmp_path))
    names = {event["name"] for event in of(document, "b", STEPS)}
    assert {"r0", "r1", "T_queue", "T_schedule", "T_prefill", "T_return", "decode", "T_stream", "preempted"} == names
