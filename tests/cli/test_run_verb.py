"""`nanovllm run`: what goes to stdout, what to stderr, and the lines of the logs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.cli.flags import Setup
from nanovllm.cli.session import command_of
from nanovllm.observe.recording import read_recording

Run = Callable[..., subprocess.CompletedProcess[str]]
TINY = ("run", "tiny:random")
WITHOUT_END = ("--ignore-eos", "--max-tokens", "1900")


def test_the_answer_alone_is_on_stdout(nanovllm: Run) -> None:
    done = nanovllm(*TINY, "hello", "--max-tokens", "6", "--timeline")
    document = json.loads(nanovllm(*TINY, "hello", "--max-tokens", "6", "--json", "--quiet").stdout)
    assert done.returncode == 0
    assert done.stdout == document["text"] + "\n"
    assert "KV pool:" in done.stderr and "blocks" in done.stderr and "prefix_mode reuse" in done.stderr
    for term in ("TTFT", "T_queue", "T_intake", "T_state", "T_schedule", "T_prefill", "T_return", "T_stream"):
        assert re.search(rf"^ *{term} +[\d,.]+ ms  measured", done.stderr, re.MULTILINE), term
    assert re.search(r"^decode: 5 gaps, median [\d.,]+ ms, P99 [\d.,]+ ms, [\d.,]+ tokens/s", done.stderr, re.MULTILINE)


def test_json_is_one_document(nanovllm: Run) -> None:
    done = nanovllm(*TINY, "hello", "--max-tokens", "4", "--json", "--quiet")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert document["model"] == "tiny:random" and document["finish_reason"] == "length"
    assert len(document["token_ids"]) == 4 and document["cached_tokens"] == 0
    assert document["prompt_len"] == document["template_tokens"] + len("hello")
    timeline = document["timeline"]
    terms = ("t_queue_ns", "t_schedule_ns", "t_prefill_ns", "t_return_ns")
    assert timeline["ttft_ns"] == sum(timeline[name] for name in terms)
    total = timeline["ttft_ns"] + sum(timeline["decode_gaps_ns"]) + timeline["t_stream_ns"]
    assert timeline["end_to_end_ns"] == total


def test_raw_leaves_the_prompt_as_it_is(nanovllm: Run) -> None:
    document = json.loads(nanovllm(*TINY, "hello", "--raw", "--max-tokens", "2", "--json").stdout)
    assert document["prompt_len"] == 1 + len("hello") and document["template_tokens"] is None  # 1: BOS


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_the_prompt_may_come_from_stdin(nanovllm: Run, arguments: tuple[str, ...]) -> None:
    done = nanovllm(*TINY, *arguments, "--max-tokens", "2", "--json", "--raw", stdin="hello\n")
    assert json.loads(done.stdout)["prompt_len"] == 1 + len("hello")


def test_a_seed_repeats_and_another_differs(nanovllm: Run) -> None:
    sampled = (*TINY, "hello", "--temperature", "2", "--max-tokens", "8", "--json", "--quiet", "--seed")
    first, again, other = (json.loads(nanovllm(*sampled, seed).stdout)["token_ids"] for seed in ("1", "1", "2"))
    assert first == again != other


def test_stop_may_be_repeated(nanovllm: Run) -> None:
    text = json.loads(nanovllm(*TINY, "hello", "--max-tokens", "12", "--json").stdout)["text"]
    stops = [character for character in text if character.isascii() and character.isprintable()][:2]
    arguments = [part for character in stops for part in ("--stop", character)]
    document = json.loads(nanovllm(*TINY, "hello", "--max-tokens", "12", "--json", *arguments).stdout)
    assert document["finish_reason"] == "stop"
    assert document["text"] == text[: min(text.index(character) for character in stops)]


def test_settings_of_a_later_source_win(nanovllm: Run, tmp_path: Path) -> None:
    """Pools of 3, 5 and 7 blocks: the file's, the environment's, the flag's."""
    file = tmp_path / "settings.toml"
    file.write_text("num_blocks = 3\n")
    call = (*TINY, "hi", "--max-tokens", "1", "--block-size", "32", "--config", str(file))
    assert " = 3 blocks = 96 tokens" in nanovllm(*call).stderr
    assert " = 5 blocks = 160 tokens" in nanovllm(*call, NANOVLLM_NUM_BLOCKS="5").stderr
    assert " = 7 blocks = 224 tokens" in nanovllm(*call, "--num-blocks", "7", NANOVLLM_NUM_BLOCKS="5").stderr


NUMBER, TIME = r"\d+", r"\[\d+\.\d{6}\]"
LINES = {
    "stage": r"req-1 \d+ [a-z_]+",
    "state": r"\d+ \d+",
    "bench": rf"{TIME} (req-1 [a-z_]+ \d+ \d+ \d+|batch_state \d+ \d+ \d+ \d+ \d+ \d+)",
}


@pytest.mark.parametrize("line_format", LINES)
def test_log_lines(nanovllm: Run, line_format: str) -> None:
    done = nanovllm(*TINY, "hello", "--max-tokens", "3", "--log", line_format, "--quiet", "--raw")
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and all(re.fullmatch(LINES[line_format], line) for line in lines), lines
    expected = {"stage": ("req-1 0 entered", "req-1 6 state_released"), "state": ("1 1", "1 1")}
    if line_format in expected:
        assert (lines[0], lines[-1]) == expected[line_format]
    else:
        assert sum("batch_state" in line for line in lines) == 3


def test_events_are_records(nanovllm: Run, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert nanovllm(*TINY, "hello", "--max-tokens", "2", "--events", str(file)).returncode == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [records[0]["record"], records[-1]["record"]] == ["header", "end"]
    events = [record for record in records if "record" not in record]
    keys = ["schema", "seq", "ts_ns", "request_id", "stage", "epoch", "prompt_len", "generated_len", "batch_size"]
    assert all(list(event) == keys + ["tokens"] * (event["stage"] == "prefill_end") for event in events)
    assert [events[0]["stage"], events[-1]["stage"]] == ["entered", "state_released"]
    assert "hello" not in file.read_text()


def test_a_recording_says_what_ran_and_is_read_back(nanovllm: Run, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    settings = ("--block-size", "2", "--num-blocks", "64", "--time-blocks", "true", "--events-blocks")
    assert nanovllm(*TINY, "hello", "--max-tokens", "3", "--events", str(file), *settings).returncode == 0
    recording = read_recording(file)
    header = recording.header
    assert (header.model, header.label, header.prior_state) == ("tiny:random", "measured", "cold")
    assert (header.block_size, header.num_blocks, header.block_bytes) == (2, 64, 512)
    assert header.command.startswith("nanovllm run tiny:random") and "--num-blocks 64" in header.command
    assert recording.end is not None and recording.end.processor_ns > 0 and not recording.remarks
    assert len(recording.steps) == 3 and all(step.block_ns and len(step.block_ns) == 4 for step in recording.steps)
    assert {event.action for event in recording.blocks} == {"stored"} and "hello" not in file.read_text()


def test_the_command_of_a_recording_has_no_password() -> None:
    setup = Setup({"num_blocks": 64, "state_remote": "redis://:the-secret@host:6379"})
    shown = "nanovllm run m --num-blocks 64 --state-remote redis://***@host:6379"
    assert command_of("run", "m", setup) == shown


def test_block_calls_are_logged_one_by_one(nanovllm: Run) -> None:
    done = nanovllm(*TINY, "hello", "--max-tokens", "2", "--log-blocks", "allocate")
    lines = [line for line in done.stderr.splitlines() if "blocks=" in line]
    assert len(lines) == 1 and lines[0].startswith("allocate req-1 blocks=")
    done = nanovllm(*TINY, "hello", "--log-blocks", "allocate,match")
    assert done.returncode == 2 and "log_blocks must be one of can_allocate, allocate, deallocate" in done.stderr


def test_ctrl_c_aborts_and_gives_blocks_back(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    process = start(*TINY, "hello", *WITHOUT_END, "--events", str(file), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in stderr
    recording = read_recording(file)
    assert [event.stage for event in recording.requests[-2:]] == ["aborted", "state_released"] and recording.end


def test_a_closed_pipe_is_no_drama(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start(*TINY, "hello", *WITHOUT_END, "--quiet", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1
    process.stderr.close()


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [(">&-", 0, ""), ("2>&-", 0, ""), ("<&-", 2, "prompt is empty"), ("> /dev/full", 1, "cannot be written")],
)
def test_closed_and_full_streams_are_told_in_a_sentence(redirection: str, code: int, words: str) -> None:
    prompt = "-" if redirection == "<&-" else "hello"
    command = f"{sys.executable} -m nanovllm run tiny:random {prompt} --raw --quiet --max-tokens 4 {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and words in done.stderr
    assert "Internal error" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.model
def test_the_default_model_answers(command: Run, smollm2_path: Path) -> None:
    question = ("What is the capital of France?", "--dtype", "float32")  # in bfloat16 two first words all but tie
    document = json.loads(command("run", "smollm2", *question, "--json").stdout)
    assert "Paris" in document["text"] and document["finish_reason"] == "stop"
