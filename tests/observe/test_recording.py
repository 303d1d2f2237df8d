"""Recordings: what is written is read back equal; whatever else is in a file is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.clock import VirtualClock
from nanovllm.core.events import (
    MOVES,
    OUTCOMES,
    STAGES,
    WAIT_REASONS,
    BlockEvent,
    EventBus,
    MoveEvent,
    RequestEvent,
    StepEvent,
    WaitEvent,
)
from nanovllm.errors import ConfigError, RecordingError
from nanovllm.observe.recording import MAX_LINE_BYTES, read_recording
from nanovllm.observe.recording_writer import JsonlWriter
from nanovllm.observe.records import RunEnd, RunHeader, from_record, header_record, to_record
from tests.observe.recorded import HEADER

numbers = st.integers(0, 2**63 - 1)
ids = st.text(max_size=20)
digests = st.binary(max_size=32)
EVENTS = st.one_of(
    st.builds(RequestEvent, *[numbers] * 2, ids, st.sampled_from(STAGES), *[numbers] * 6),
    st.builds(StepEvent, *[numbers] * 11, st.none() | st.tuples(*[numbers] * 4)),
    st.builds(WaitEvent, *[numbers] * 2, ids, st.sampled_from(WAIT_REASONS), *[numbers] * 3, ids),
    st.builds(
        MoveEvent, *[numbers] * 2, st.sampled_from(MOVES), ids, ids, *[numbers] * 3, st.sampled_from(OUTCOMES), ids
    ),
    st.builds(BlockEvent, *[numbers] * 2, ids, digests, digests, numbers, ids, st.none()),
)


@pytest.fixture
def bus() -> EventBus:
    return EventBus(VirtualClock(start_ns=1_234_567_899), capacity=8)


def one_of_each(bus: EventBus, request_id: str = "req-1") -> None:
    bus.request(request_id, "decode_step", 1, 40, 1, 3)
    bus.step(9, 3, 4, 5, 16, 2, 77)
    bus.wait(request_id, "blocks", 4, 2, 3)
    bus.block("stored", b"d", b"p", 16, token_ids=(104, 105))


def written(tmp_path: Path, *lines: Any) -> Path:
    file = tmp_path / "run.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@given(EVENTS)
def test_an_event_is_read_back_as_it_was(event: Any) -> None:
    assert from_record(json.loads(json.dumps(to_record(event)))) == event


def test_a_request_event_keeps_its_form(bus: EventBus, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    with JsonlWriter(bus, file, HEADER) as writer:
        one_of_each(bus, "a\nb")
        writer.pump()
        lines = file.read_text().splitlines()  # before it is closed
    assert list(json.loads(lines[1]).items()) == [
        ("schema", 1),
        ("seq", 0),
        ("ts_ns", 1_234_567_899),
        ("request_id", "a\nb"),
        ("stage", "decode_step"),
        ("epoch", 1),
        ("prompt_len", 40),
        ("generated_len", 1),
        ("batch_size", 3),
    ]


@pytest.mark.parametrize("blocks", [False, True])
def test_a_run_is_read_back(bus: EventBus, tmp_path: Path, blocks: bool) -> None:
    file = tmp_path / "events.jsonl"
    with JsonlWriter(bus, file, HEADER, blocks=blocks):
        one_of_each(bus)
    recording = read_recording(file)
    assert recording.header == HEADER and recording.end == RunEnd() and recording.remarks == []
    counts = [len(kept) for kept in (recording.requests, recording.steps, recording.waits, recording.blocks)]
    assert counts == [1, 1, 1, int(blocks)]
    assert "104" not in file.read_text(), "token ids are prompt content"


def test_a_file_stays_within_its_bound_and_says_what_is_missing(bus: EventBus, tmp_path: Path) -> None:
    header_bytes = len(json.dumps(header_record(HEADER), separators=(",", ":"))) + 1
    file, bound = tmp_path / "events.jsonl", header_bytes + 160 + 200  # the last line's and one record's, not two
    with JsonlWriter(bus, file, HEADER, max_bytes=bound) as writer:
        for request_id in ("first", "second", "x" * 200, "y"):
            bus.request(request_id, "queued", 0, 1, 0)
        writer.pump()
        assert (writer.omitted, writer.dropped) == (3, 0)
    recording = read_recording(file)
    assert [event.request_id for event in recording.requests] == ["first"] and file.stat().st_size <= bound
    assert recording.remarks == ["3 events are missing: figures over them are too low."]


def test_what_the_bus_forgot_is_counted(bus: EventBus, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    with JsonlWriter(bus, file, HEADER):
        for _ in range(11):
            bus.request("r", "queued", 0, 1, 0)
    recording = read_recording(file)
    assert recording.end == RunEnd(dropped=3) and len(recording.requests) == 8


def test_a_run_that_was_cut_off_is_read_and_says_so(bus: EventBus, tmp_path: Path) -> None:
    writer = JsonlWriter(bus, tmp_path / "events.jsonl", HEADER)
    one_of_each(bus)
    writer.pump()
    assert "cut off" in read_recording(tmp_path / "events.jsonl").remarks[0]
    writer.close()


def test_a_file_that_cannot_be_written(bus: EventBus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        JsonlWriter(bus, tmp_path / "nowhere" / "events.jsonl", HEADER)


HEAD = {"schema": 1, "record": "header", **HEADER.__dict__}
EVENT = to_record(RequestEvent(3, 0, "r", "queued", 0, 1, 0, 0))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "is empty"),
        ([EVENT], "line 1: the first line is not a header"),
        ([{**HEAD, "schema": 2}], "line 1: schema 2 is not 1"),
        ([{**HEAD, "label": "guessed"}], "line 1: label must be one of measured, simulated, not 'guessed'"),
        ([{**HEAD, "num_blocks": 0}], "line 1: num_blocks must be at least 1"),
        ([{**HEAD, "knobs": {"max_num_seqs": "4"}}], "line 1: max_num_seqs cannot be '4'"),
        ([{key: value for key, value in HEAD.items() if key != "seed"}], "line 1: the field 'seed' is missing"),
        ([HEAD, {**EVENT, "stage": "thinking"}], "line 2: stage must be one of entered, "),
        ([HEAD, {**EVENT, "prompt": "secret"}], "line 2: the field 'prompt' is unknown"),
        ([HEAD, {**EVENT, "ts_ns": 1.5}], "line 2: ts_ns cannot be 1.5"),
        ([HEAD, {**EVENT, "ts_ns": True}], "line 2: ts_ns cannot be True"),
        ([HEAD, {**EVENT, "prompt_len": -1}], "line 2: prompt_len cannot be -1"),
        ([HEAD, {**EVENT, "seq": 2**63}], "line 2: seq cannot be"),
        ([HEAD, EVENT, EVENT], "line 3: seq 3 does not follow the one before it"),
        ([HEAD, {"schema": 1, "record": ["step"]}], r"line 2: record \['step'\] is unknown"),
        ([HEAD, {"schema": 1, "record": "end", "dropped": 0, "omitted": 0, "processor_ns": 0}, EVENT], "line 3: some"),
        ([HEAD, "[1]"], "line 2: this is no JSON object"),
        ([HEAD, "{"], "line 2: this is no JSON"),
        ([HEAD, "[" * 60_000], "line 2: "),
        ([HEAD, '"' + "x" * MAX_LINE_BYTES + '"'], "line 2: the line is too long"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, lines: list[Any], reason: str) -> None:
    with pytest.raises(RecordingError, match=reason):
        read_recording(written(tmp_path, *lines))


def test_a_run_that_was_cut_within_a_line_is_read_up_to_it_and_says_so(tmp_path: Path) -> None:
    """At every byte of the last line; a line that is broken in the middle stays an error."""
    whole = written(tmp_path, HEAD, EVENT, {**EVENT, "seq": 4}).read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    file = tmp_path / "cut.jsonl"
    for length in range(start + 1, len(whole)):
        file.write_bytes(whole[:length])
        recording = read_recording(file)
        assert [event.seq for event in recording.events] == [3] and recording.end is None
        assert "cut off within its line 3" in recording.remarks[0]
    lines = whole.splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(RecordingError, match="line 2: this is no JSON"):
        read_recording(file)
    file.write_bytes(lines[0][:-1])
    with pytest.raises(RecordingError, match="line 1: the line is cut off"):
        read_recording(file)


TOKENS = [to_record(RequestEvent(i, i, "r", "decode_step", 0, 1, i, 1)) for i in range(4)]
DONE = to_record(RequestEvent(4, 4, "r", "output_complete", 0, 1, 4, 0))
END = {"schema": 1, "record": "end", "dropped": 0, "omitted": 0, "processor_ns": 0}


def test_a_count_of_tokens_that_the_records_do_not_bear_out_is_refused(tmp_path: Path) -> None:
    assert len(read_recording(written(tmp_path, HEAD, *TOKENS, DONE, END)).requests) == 5
    for claim in (5, 10**11):
        for last in ([END], []):
            file = written(tmp_path, HEAD, *TOKENS, {**DONE, "generated_len": claim}, *last)
            with pytest.raises(
                RecordingError, match=f"line 6: generated_len {claim}, but the records so far tell of 4"
            ):
                read_recording(file)
    # what the bus lost may have told it
    assert read_recording(written(tmp_path, HEAD, *TOKENS[2:], DONE, {**END, "dropped": 2})).events
    assert read_recording(written(tmp_path, HEAD, *TOKENS[2:], DONE)).events
    with pytest.raises(RecordingError, match="line 4: generated_len 4, but the records so far tell of 2"):
        read_recording(written(tmp_path, HEAD, *TOKENS[2:], DONE, END))


def test_a_long_file_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, HEAD, EVENT)
    with pytest.raises(RecordingError, match="line 2: the file is longer than"):
        read_recording(file, max_bytes=file.stat().st_size - 1)
    with pytest.raises(RecordingError, match="cannot be read"):
        read_recording(tmp_path / "nowhere.jsonl")


@settings(max_examples=60)
@given(st.integers(0, 600), st.binary(min_size=1, max_size=6))
def test_damaged_bytes_end_in_one_sentence_or_in_a_recording(place: int, damage: bytes) -> None:
    import tempfile

    data = (json.dumps(HEAD) + "\n" + json.dumps(EVENT) + "\n").encode()
    place = min(place, len(data))
    with tempfile.NamedTemporaryFile() as file:
        file.write(data[:place] + damage + data[place + len(damage) :])
        file.flush()
        try:
            assert isinstance(read_recording(Path(file.name)).header, RunHeader)
        except RecordingError as error:
            assert file.name in str(error)
