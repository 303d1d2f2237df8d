"""`nanovllm trace`: recordings made, shown, exported, compared and diagnosed, as a person would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.observe.recording import read_recording
from tests.cli.conftest import COMMAND
from tests.observe.test_perfetto import check_nesting, check_schema

Run = Callable[..., subprocess.CompletedProcess[str]]
SIMULATED = ("trace", "record", "mixed_ctx", "simulated", "--sessions", "8", "--num-blocks", "96", "--seed", "1")
TERMS = ("T_queue", "T_intake", "T_state", "T_schedule", "T_prefill", "T_return", "T_stream")
LABELS = re.compile(r"measured|simulated|estimated")


@pytest.fixture(scope="session")
def runs(command: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fcfs.jsonl and sjf.jsonl: one workload under two policies, simulated."""
    folder = tmp_path_factory.mktemp("runs")
    for policy in ("fcfs", "sjf"):
        done = command(*SIMULATED, "--policy", policy, "--events", str(folder / f"{policy}.jsonl"))
        assert done.returncode == 0 and "8 requests, 8 served, 0 refused, 0 skipped" in done.stdout
    return folder


def one(document: str) -> Any:
    return json.loads(document, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_simulated_recording_is_the_same_each_time(command: Run, runs: Path, tmp_path: Path) -> None:
    again = tmp_path / "fcfs.jsonl"
    command(*SIMULATED, "--policy", "fcfs", "--events", str(again))
    assert again.read_bytes() == (runs / "fcfs.jsonl").read_bytes()
    header = read_recording(again).header
    assert (header.label, header.model, header.num_blocks) == ("simulated", "simulated", 96)
    assert header.command.startswith("nanovllm trace record mixed_ctx --sessions 8 --seed 1 simulated --num-blocks 96")


def test_a_recorded_command_can_be_repeated(command: Run, runs: Path, tmp_path: Path) -> None:
    recorded = read_recording(runs / "sjf.jsonl").header.command.split()[1:]
    assert command(*recorded, "--events", str(tmp_path / "again.jsonl")).returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (runs / "sjf.jsonl").read_bytes()


def test_show_prints_every_request_and_every_figure_with_its_label(nanovllm: Run, runs: Path) -> None:
    done = nanovllm("trace", "show", str(runs / "fcfs.jsonl"), "--slo", "ttft:1000")
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    for name in [f"s{i}-t0" for i in range(8)]:
        assert re.search(rf"^{name} +\d+ .* output_complete", done.stdout, re.MULTILINE)
    figures = done.stdout[done.stdout.index("throughput") :].splitlines()
    assert all(LABELS.search(line) for line in figures), figures
    named = {line.split("  ")[0] for line in figures if not line.startswith(" ")}
    assert named == {"throughput", "goodput", "state", "cost", "stability"}
    for words in ("prefilling", "waiting", "cached", "kv_held", "approximation bound", "sharing", "block-seconds"):
        assert words in done.stdout


@pytest.mark.parametrize("width", [40, 60, 100, 140])
def test_a_narrow_terminal_loses_columns_and_no_figure(clean_env: dict[str, str], runs: Path, width: int) -> None:
    """On a terminal of its own; without NO_COLOR there is colour, and it is not what carries a meaning."""
    ours, theirs = os.openpty()
    environment = {**clean_env, "COLUMNS": str(width), "TERM": "xterm"}
    del environment["NO_COLOR"]
    arguments = [*COMMAND, "trace", "show", str(runs / "fcfs.jsonl")]
    with subprocess.Popen(arguments, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = read_all_of(ours)
    assert process.returncode == 0 and "\x1b[1m" in shown
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    tables = lines[: next(i for i, line in enumerate(lines) if line.startswith("run "))]
    assert "…" not in shown and all(len(line.rstrip()) <= width for line in tables if not line.startswith("("))
    assert tables[0].startswith("request") and "TTFT" in tables[0]
    assert ("no room for" in shown) == (width < 140)


def read_all_of(terminal: int) -> str:
    """Everything until the other side has gone."""
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 65536)
        except OSError:
            os.close(terminal)
            return seen.decode()


def test_show_as_json_says_the_same(nanovllm: Run, runs: Path) -> None:
    found = one(nanovllm("trace", "show", str(runs / "fcfs.jsonl"), "--slo", "ttft:1000", "--json").stdout)
    assert found["label"] == "simulated" and len(found["paths"]) == 8
    assert found["goodput"]["requests"] == sum(path["ttft_ns"] <= 1000e6 for path in found["paths"]) > 0
    for path in found["paths"]:
        assert path["ttft_ns"] == sum(path[f"t_{term}_ns"] for term in ("queue", "schedule", "prefill", "return"))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_path_shows_its_terms_and_that_they_add_up(nanovllm: Run, runs: Path, lang: str) -> None:
    done = nanovllm("trace", "show", str(runs / "fcfs.jsonl"), "--request", "s3-t0", "--lang", lang)
    for term in ("TTFT", *TERMS, "decode", "end to end"):
        assert re.search(rf"^ *{term} +[\d,.]+ ms  simulated", done.stdout, re.MULTILINE), term
    stages = re.findall(r" ms  simulated  record \d+ +([a-z_]+)", done.stdout)
    assert stages[0] == "entered" and stages[-1] == "state_released" and "prefill_begin" in stages
    assert ("checked: TTFT" if lang == "en" else "已核对：TTFT") in done.stdout


def test_diagnose_names_cause_evidence_and_refutation(nanovllm: Run, runs: Path) -> None:
    file = runs / "fcfs.jsonl"
    text = nanovllm("trace", "diagnose", str(file)).stdout
    found = one(nanovllm("trace", "diagnose", str(file), "--json").stdout)
    named = [cause for cause in found["causes"] if cause["is_named"]]
    assert named and found["verdict"] in text.splitlines()[0]
    for cause in named:
        assert f"{cause['class']}/{cause['cause']} (simulated)" in text
        assert all(f"record {row['record']} explains" in text for row in cause["evidence"])
    assert text.count("would refute it:") == len(named)
    chinese = nanovllm("trace", "diagnose", str(file), "--lang", "zh").stdout
    assert chinese.count("可否定它的实验：") == len(named) and "record" not in chinese


def test_diagnose_one_request_and_one_window(nanovllm: Run, runs: Path) -> None:
    file = str(runs / "fcfs.jsonl")
    assert "request s3-t0" in nanovllm("trace", "diagnose", file, "--request", "s3-t0").stdout
    window = one(nanovllm("trace", "diagnose", file, "--from", "0.1", "--to", "0.2", "--json").stdout)
    assert window["scope"] == {"request": None, "from_ns": 100_000_000, "to_ns": 200_000_000}


def test_compare_sets_two_policies_side_by_side(nanovllm: Run, runs: Path) -> None:
    files = [str(runs / f"{policy}.jsonl") for policy in ("fcfs", "sjf")]
    done = nanovllm("trace", "compare", *files)
    assert done.returncode == 0 and re.search(r"^policy +fcfs  \|  sjf", done.stdout, re.MULTILINE)
    assert "A (simulated)" in done.stdout and "B (simulated)" in done.stdout
    found = one(nanovllm("trace", "compare", *files, "--json").stdout)
    assert found["figures"]["TTFT p50"]["first"] != found["figures"]["TTFT p50"]["second"]
    assert [run["label"] for run in found["diagnoses"]] == ["simulated", "simulated"]


def test_export_writes_what_others_read(nanovllm: Run, runs: Path, tmp_path: Path) -> None:
    targets = {name: tmp_path / f"run.{name}" for name in ("perfetto", "mermaid", "svg")}
    flags = [part for name, path in targets.items() for part in (f"--{name}", str(path))]
    done = nanovllm("trace", "export", str(runs / "fcfs.jsonl"), "--request", "s3-t0", "--lang", "zh", *flags)
    assert done.returncode == 0
    document = one(targets["perfetto"].read_text())
    check_schema(document)
    check_nesting(document)
    assert targets["mermaid"].read_text().startswith("sequenceDiagram\n    title s3-t0")
    assert ET.fromstring(targets["svg"].read_text()).tag.endswith("svg")  # noqa: S314  our own text


def test_the_default_request_is_the_first(nanovllm: Run, runs: Path, tmp_path: Path) -> None:
    nanovllm("trace", "export", str(runs / "fcfs.jsonl"), "--mermaid", str(tmp_path / "m"))
    assert "title s0-t0" in (tmp_path / "m").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "nowhere.jsonl"), "cannot be read"),
        (("show", "FILE", "--request", "nobody"), "no request 'nobody'"),
        (("show", "FILE", "--slo", "soon"), "slo cannot be read"),
        (("diagnose", "FILE", "--from", "5", "--to", "1"), "window is empty"),
        (("diagnose", "FILE", "--from", "900", "--to", "1000"), "The run's requests lived from 0.000 s to "),
        (("export", "FILE"), "Nothing to write"),
        (("export", "FILE", "--svg", "nowhere/x.svg"), "cannot be written"),
        (("compare", "FILE", "OTHER"), "different models"),
        (("record", "mixed_ctx", "simulated"), "--events"),
        (("record", "mixed", "simulated", "--events", "x"), "Did you mean 'mixed_ctx'"),
        (("record", "rag", "simulated", "--events", "x", "--kernels", "cpu"), "--kernels means nothing"),
        (("record", "rag", "simulated", "--events", "nowhere/x"), "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    nanovllm: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file, other = runs / "fcfs.jsonl", tmp_path / "other.jsonl"
    other.write_text(file.read_text().replace('"weights":"simulated"', '"weights":"others"', 1))
    places = {"FILE": str(file), "OTHER": str(other)}
    done = nanovllm("trace", *(places.get(part, part) for part in arguments))
    assert done.returncode == 2 and words in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_that_a_crash_cut_within_a_line_is_seen_and_each_view_says_so(
    nanovllm: Run, runs: Path, tmp_path: Path
) -> None:
    whole, file = (runs / "fcfs.jsonl").read_bytes(), tmp_path / "cut.jsonl"
    file.write_bytes(whole[: len(whole) * 2 // 3].rstrip(b"\n")[:-5])
    targets = {name: tmp_path / f"run.{name}" for name in ("perfetto", "mermaid", "svg")}
    flags = [part for name, path in targets.items() for part in (f"--{name}", str(path))]
    assert nanovllm("trace", "export", str(file), *flags).returncode == 0
    one_request = ("--request", "s0-t0")
    views = [("show",), ("show", *one_request), ("diagnose",), ("diagnose", *one_request), ("compare", str(file))]
    for verb, *more in views:
        for form in ([], ["--json"]):
            done = nanovllm("trace", verb, str(file), *more, *form)
            assert done.returncode == 0 and "cut off within its line" in done.stdout, (verb, more, form)
    for path in targets.values():
        assert "cut off within its line" in path.read_text()


def test_a_compared_limit_stands_apart_from_its_values(nanovllm: Run, runs: Path, tmp_path: Path) -> None:
    file, other = runs / "fcfs.jsonl", tmp_path / "other.jsonl"
    other.write_text(file.read_text().replace('"max_new_requests_per_step":0', '"max_new_requests_per_step":1', 1))
    done = nanovllm("trace", "compare", str(file), str(other))
    assert re.search(r"^max_new_requests_per_step +0  \|  1$", done.stdout, re.MULTILINE)


def test_a_file_that_is_no_recording_is_refused(nanovllm: Run, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    done = nanovllm("trace", "show", str(tmp_path / "x.jsonl"))
    assert done.returncode == 2 and "line 1" in done.stderr


def test_what_a_recording_made_up_steers_no_terminal(nanovllm: Run, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text((runs / "fcfs.jsonl").read_text().replace('"s3-t0"', '"\\u001b[2Jx[bold]\\n"'))
    name = "\x1b[2Jx[bold]\n"
    for arguments in (("show", str(file)), ("show", str(file), "--request", name), ("diagnose", str(file))):
        done = nanovllm("trace", *arguments)
        assert done.returncode == 0 and "\x1b" not in done.stdout
    assert "x[bold]" in nanovllm("trace", "show", str(file)).stdout


def test_block_calls_and_real_time_of_a_real_engine(nanovllm: Run, tmp_path: Path) -> None:
    """A workload on tiny:random, measured: two chunks of a pool, the time in block calls, and a warm comparison."""
    file = tmp_path / "run.jsonl"
    sizes = ("--sessions", "4", "--length", "12", "--output-len", "4", "--num-blocks", "40", "--block-size", "4")
    done = nanovllm(
        "trace", "record", "short_ctx", "tiny:random", *sizes, "--time-blocks", "true", "--events", str(file)
    )
    assert done.returncode == 0 and "4 requests, 4 served" in done.stdout
    found = one(nanovllm("trace", "show", str(file), "--json").stdout)
    assert found["label"] == "measured" and found["cost"]["processor_seconds_per_token"] > 0
    assert all(ns["total"] > 0 for ns in found["block_calls_ns"].values()) and len(found["block_calls_ns"]) == 4
    assert "block calls us a step: can_allocate" in nanovllm("trace", "show", str(file)).stdout


@pytest.mark.model
def test_smollm2_is_recorded_and_read(command: Run, smollm2_path: Path, tmp_path: Path) -> None:
    """The whole way as a person goes it: a real model, a real recording, each verb a process of its own."""
    file, picture = str(tmp_path / "run.jsonl"), tmp_path / "run.svg"
    question = ("run", "smollm2", "What is the capital of France?", "--max-tokens", "6", "--json")
    document = one(command(*question, "--events", file).stdout)
    path = one(command("trace", "show", file, "--request", "req-1", "--json").stdout)
    kept = document["timeline"]
    assert {name: path[name] for name in kept if name != "state_wait_ns"} == {
        name: kept[name] for name in kept if name != "state_wait_ns"
    }
    assert (path["prompt_len"], path["generated_len"]) == (document["prompt_len"], len(document["token_ids"]))
    assert path["state"]["block_exact_bytes"] == path["state"]["blocks"] * 16 * 23_040
    assert "France" not in Path(file).read_text()
    assert command("trace", "diagnose", file).returncode == 0
    assert command("trace", "export", file, "--svg", str(picture)).returncode == 0
    drawn = [node.text for node in ET.fromstring(picture.read_text()).iter() if node.get("class") == "w"]  # noqa: S314
    assert drawn == list("12345") and "measured" in picture.read_text()
