"""The comparison with the peers: real child processes, a scripted engine in them; no peer is installed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from bars import BARS
from peers import comparison, engines, report, rows, visits, weights

from nanovllm.models.loading import load_model_files, tiny_config
from tests.models.model_files import write_gguf

SCRIPT = str(Path(__file__).with_name("scripted_worker.py"))
MINE = engines.Engine("nanovllm", SCRIPT)
PEER = engines.Engine("vllm", SCRIPT)
OTHER = engines.Engine("transformers", SCRIPT)
THIRD = engines.Engine("llama_cpp", SCRIPT)
ALL = [MINE, PEER, THIRD, OTHER]
SMALL = list(rows.make_rows(64))


@pytest.fixture
def place(tmp_path: Path) -> visits.Place:
    return visits.Place(tmp_path, tmp_path / "weights", tmp_path / "model.gguf", threads=1, max_model_len=512)


@pytest.fixture
def worker(place: visits.Place) -> Iterator[visits.Worker]:
    with visits.visit(MINE, sys.executable, place, is_capped=False) as worker:
        yield worker


def asked(first: int = 9, max_tokens: int = 3, **more: int) -> dict[str, Any]:
    return {"ids": [first, 8, 7], "max_tokens": max_tokens, **more}


def named(name: str) -> rows.Row:
    return next(row for row in SMALL if row.name == name)


def compare(place: visits.Place, some: list[rows.Row], repeats: int = 1, path: Path | None = None) -> Any:
    """Run it with real workers; returns the record and who was visited."""
    record, visited = comparison.Record.load(path, {"of": "a test"}), []

    def visit(engine: engines.Engine, is_capped: bool) -> Any:
        visited.append((engine.name, is_capped))
        return visits.visit(engine, sys.executable, place, is_capped)

    comparison.compare(some, ALL, repeats, record, visit, visits.measure, path)
    return record, visited


# -- a worker --------------------------------------------------------------------------------------


def test_a_worker_answers_with_tokens_and_times(worker: visits.Worker) -> None:
    first, second = worker.send([asked(5), asked(6, 2)])
    assert (first["tokens"], second["tokens"]) == ([5, 5, 5], [6, 6])
    assert first["added_s"] <= first["token_s"][0] <= first["token_s"][-1]
    assert worker.start_s > 0


def test_a_late_request_is_added_when_those_before_it_have_their_tokens(worker: visits.Worker) -> None:
    *early, late = worker.send([asked(5, 9), asked(6, 9), asked(7, 2, after=4)])
    for one in early:
        assert one["token_s"][3] <= late["added_s"] <= one["token_s"][5]


def test_another_number_of_tokens_is_refused(worker: visits.Worker) -> None:
    with pytest.raises(ValueError, match="1 tokens came instead of 3"):
        worker.send([asked(2)])


def test_what_an_engine_raises_is_told_and_the_worker_lives(worker: visits.Worker) -> None:
    with pytest.raises(ValueError, match="no room for the prompt"):
        worker.send([asked(3)])
    assert worker.send([asked(5)])


def test_a_worker_that_dies_is_missing_with_its_last_words(worker: visits.Worker) -> None:
    with pytest.raises(engines.Missing, match="out of luck"):
        worker.send([asked(1)])


def test_nothing_a_worker_started_outlives_its_visit(place: visits.Place) -> None:
    with visits.visit(MINE, sys.executable, place, is_capped=False) as worker:
        child = worker.send([asked(4, 1)])[0]["tokens"][0]
        pids = [worker.process.pid, child]
        assert all(map(psutil.pid_exists, pids))
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_capped_workers_get_both_variables_and_float32(place: visits.Place) -> None:
    with visits.visit(MINE, sys.executable, place, is_capped=True) as worker:
        assert worker.about["cap"] == "avx2"
    assert place.settings(MINE, True)["dtype"] == "float32"
    assert place.environment(MINE, True)["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_vllm_is_bound_to_as_many_cores_as_it_has_threads(tmp_path: Path) -> None:
    vllm = next(peer for peer in engines.PEERS if peer.name == "vllm")
    two = visits.Place(tmp_path, tmp_path, None, threads=2, max_model_len=512).environment(vllm, False)
    assert (two["VLLM_CPU_OMP_THREADS_BIND"], two["OMP_NUM_THREADS"]) == ("0-1", "2")


# -- a comparison ----------------------------------------------------------------------------------


def test_the_order_turns_round_and_capped_rows_have_visits_of_their_own(place: visits.Place) -> None:
    _, visited = compare(place, [named("ttft_128"), named("capped_one_stream")], repeats=2)
    free = [name for name, is_capped in visited if not is_capped]
    names = [engine.name for engine in ALL]
    assert free == [*names, *reversed(names)]
    assert [name for name, is_capped in visited if is_capped] == [
        "nanovllm",
        "transformers",
        "transformers",
        "nanovllm",
    ]


def test_every_engine_gets_the_same_tokens_and_each_repeat_others() -> None:
    sent: dict[tuple[str, int], list[Any]] = {}
    for engine in ("a", "b"):
        for repeat in (0, 1):
            list_of = sent.setdefault((engine, repeat), [])

            def send(requests: list[Any], list_of: list[Any] = list_of) -> list[Any]:
                list_of.append([request["ids"] for request in requests])
                return [{"added_s": 0.0, "token_s": [1.0 + i for i in range(r["max_tokens"])]} for r in requests]

            named("concurrent_8").measure(rows.Draw("concurrent_8", repeat), send)
    assert sent["a", 0] == sent["b", 0]
    assert sent["a", 0] != sent["a", 1]


def test_bars_of_issue_4_read_figures_that_the_comparison_makes(place: visits.Place) -> None:
    record, _ = compare(place, SMALL)
    found = json.loads(json.dumps(report.document(SMALL, record)))
    paths = [bar.figure for bar in BARS if bar.issue == 4 and "peers.py" in bar.command]
    assert len(paths) == 14
    for path in paths:
        figure: Any = found
        for key in path.split("."):
            figure = figure[key]
        assert figure > 0, path


def test_an_interrupted_run_goes_on_where_it_stopped(place: visits.Place, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    before, _ = compare(place, [named("ttft_128")], repeats=1, path=path)
    after, visited = compare(place, [named("ttft_128")], repeats=2, path=path)
    assert [name for name, _ in visited] == [engine.name for engine in reversed(ALL)]
    for engine in ALL:
        kept = after.runs["ttft_128"][engine.name]
        assert len(kept) == 2
        assert kept[0] == before.runs["ttft_128"][engine.name][0]
    with pytest.raises(SystemExit, match="other settings"):
        comparison.Record.load(path, {"of": "another test"})


def test_who_cannot_start_is_missing_and_has_no_figure(place: visits.Place) -> None:
    refusing = engines.Engine("vllm", SCRIPT, settings={"refuses": True})
    record, some = comparison.Record({}), [named("ttft_128")]
    comparison.compare(
        some, [MINE, refusing], 2, record, lambda e, c: visits.visit(e, sys.executable, place, c), visits.measure
    )
    found = report.document(some, record)
    assert "this processor will not do" in found["missing"]["vllm"]
    assert found["rows"]["ttft_128"]["ratio"] == {}
    assert set(found["runs"]["ttft_128"]) == {"nanovllm"}


def test_a_row_that_fails_leaves_the_others() -> None:
    def measure(worker: Any, row: rows.Row, repeat: int) -> rows.Figures:
        if row.name == "ttft_128" and worker.about["name"] == "vllm":
            raise ValueError("too long")
        return {"ttft_s": 1.0}

    @contextmanager
    def visit(engine: engines.Engine, is_capped: bool) -> Iterator[Any]:
        yield type("Worker", (), {"about": {"name": engine.name}})

    record, some = comparison.Record({}), [named("ttft_128"), named("ttft_1024")]
    comparison.compare(some, [MINE, PEER], 2, record, visit, measure)
    assert record.failed == {"ttft_128": {"vllm": "too long"}}
    assert len(record.runs["ttft_1024"]["vllm"]) == 2


# -- figures ---------------------------------------------------------------------------------------


def test_ratios_above_one_mean_that_this_engine_is_better() -> None:
    record = comparison.Record({})
    for name, mine, theirs in (("ttft_128", 1.0, 3.0), ("one_stream", 30.0, 10.0)):
        figure = named(name).figure
        for engine, value in ((MINE, mine), (PEER, theirs)):
            record.add(name, engine.name, {figure: value})
    found = report.document(SMALL, record)
    assert [found["rows"][name]["ratio"]["vllm"] for name in ("ttft_128", "one_stream")] == [3.0, 3.0]


def test_the_gap_is_the_longest_pause_after_the_arrival_and_no_earlier_one() -> None:
    def send(requests: list[Any]) -> list[Any]:
        if len(requests) == 1:
            return [{"added_s": 0.0, "token_s": [2.0]}]
        steady = [float(i) for i in range(20)]
        stream = {"added_s": 0.0, "token_s": [*steady, 25.0, 28.0, 29.0]}
        early = {"added_s": 0.0, "token_s": [-50.0, *steady, 24.5, 28.0, 29.0]}
        return [*[stream] * (len(requests) - 2), early, {"added_s": 19.5, "token_s": [22.5]}]

    figures = rows.decode_gap(64)(rows.Draw("x"), send)
    assert figures["gap_s"] == 6.0
    assert (figures["ttft_s"], figures["solo_ttft_s"], figures["ttft_over_solo"]) == (3.0, 2.0, 1.5)
    assert figures["usual_gap_s"] == 1.0


def test_streams_that_end_too_early_make_no_gap() -> None:
    def send(requests: list[Any]) -> list[Any]:
        return [
            *[{"added_s": 0.0, "token_s": [1.0, 2.0, 3.0]}] * (len(requests) - 1),
            {"added_s": 2.5, "token_s": [3.0]},
        ]

    with pytest.raises(ValueError, match="ended before"):
        rows.decode_gap(64)(rows.Draw("x"), send)


# -- weights and environments ----------------------------------------------------------------------


def test_exported_weights_are_the_files_values_in_bf16(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    write_gguf(source, tiny_config("llama"))
    home, gguf = weights.exported(str(source), tmp_path / "peers")
    assert gguf == source
    ours, theirs = load_model_files(str(source)), load_model_files(str(home))
    assert theirs.config.inv_freq().equal(ours.config.inv_freq())
    for name in ours.weights.names():
        assert theirs.weights.get(name).dtype == torch.bfloat16
        assert theirs.weights.get(name).equal(ours.weights.get(name).to(torch.bfloat16)), name
    assert theirs.tokenizer.encode("some text") == ours.tokenizer.encode("some text")


def test_a_build_that_fails_is_missing_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no wheel for this machine'); raise SystemExit(2)"]
    with pytest.raises(engines.Missing, match=r"ended with 2: .*no wheel for this machine"):
        engines.run_step(command, {}, tmp_path / "build.log")


def test_an_environment_that_cannot_be_written_is_missing(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("in the way")
    with pytest.raises(engines.Missing, match="cannot be written"):
        engines.python_of(engines.Engine("broken", SCRIPT, ("nothing",)), tmp_path)
