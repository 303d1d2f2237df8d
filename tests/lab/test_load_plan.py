"""Arrival times and prompts: seeded, repeatable, and what the settings say."""

from __future__ import annotations

import math
import statistics
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import InvalidRequestError, NanoVLLMError
from nanovllm.lab.arrivals import arrival_times_ns
from nanovllm.lab.prompts import Prompt, Shape, from_file, made_up, repeated
from nanovllm.lab.serve_bench import BenchSettings, asked_prompts, plan, request_body
from nanovllm.lab.workloads import generate


@given(st.integers(1, 50), st.floats(0.01, 1e6), st.floats(0.05, 50), st.integers(0, 2**32))
def test_arrivals_are_seeded_and_in_order(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = arrival_times_ns(count, rate, burstiness, seed)
    assert times == arrival_times_ns(count, rate, burstiness, seed)
    assert len(times) == count and times[0] == 0 and all(a <= b for a, b in pairwise(times))
    assert times[: count - 1] == arrival_times_ns(count + 5, rate, burstiness, seed)[: count - 1]


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_gaps_have_the_mean_and_spread_of_the_gamma_law(burstiness: float, spread: float) -> None:
    gaps = [b - a for a, b in pairwise(arrival_times_ns(20_001, 10.0, burstiness, 1))]
    mean = statistics.mean(gaps)
    assert mean == pytest.approx(1e8, rel=0.05)
    assert statistics.stdev(gaps) / mean == pytest.approx(spread, rel=0.05)  # 1 / sqrt(burstiness)


def test_an_infinite_rate_is_all_at_once_and_another_seed_another_time() -> None:
    assert arrival_times_ns(3, math.inf, 1.0, 0) == [0, 0, 0]
    assert arrival_times_ns(9, 1.0, 1.0, 0) != arrival_times_ns(9, 1.0, 1.0, 1)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 9), st.none() | st.integers(1, 99))
def test_prompts_have_the_lengths_asked_for(
    input_len: int, output_len: int, ratio: float, prefix: int, vocab: int | None
) -> None:
    shape = Shape(input_len, output_len, ratio, prefix, vocab)
    prompts = list(islice(made_up(shape, 3), 20))
    assert prompts == list(islice(made_up(shape, 3), 20))
    words: list[list[Any]] = [p.content.split() if isinstance(p.content, str) else p.content for p in prompts]
    assert len({tuple(found[:prefix]) for found in words}) == 1
    for lengths, asked in (
        ([len(found) - prefix for found in words], input_len),
        ([p.output_len for p in prompts], output_len),
    ):
        spread = int(asked * ratio)
        assert all(max(1, asked - spread) <= length <= asked + spread for length in lengths)
    assert vocab is None or all(0 <= token < vocab for found in words for token in found)


def test_a_seed_a_longer_run_and_the_warm_up() -> None:
    shape = Shape(16, 4, prefix_len=2)
    ten = list(islice(made_up(shape, 0), 10))
    assert ten == list(islice(made_up(shape, 0), 30))[:10]
    assert ten != list(islice(made_up(shape, 1), 10))
    warm = list(islice(made_up(shape, 0, "warm-up"), 10))
    assert not {p.content for p in ten} & {p.content for p in warm}
    assert {p.content.split()[0] for p in ten} == {p.content.split()[0] for p in warm}  # the prefix is shared


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        'plain text\n\n"a string"\n{"prompt": "an object", "max_tokens": 7}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}\n12\n"not closed\n',
        encoding="utf-8",
    )
    found = from_file(file, 9)
    assert [p.content for p in found] == [
        "plain text",
        "a string",
        "an object",
        [{"role": "user", "content": "hi"}],
        "12",
        '"not closed',
    ]
    assert [p.output_len for p in found] == [9, 9, 7, 9, 9, 9]
    assert repeated(found, 8)[6:] == found[:2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n\n", "holds no prompt"),
        ('fine\n{"prompt": \n', ":2 begins like a JSON object"),
        ('{"max_tokens": 3}', ":1 needs prompt or messages"),
        ('{"prompt": "x", "max_tokens": "many"}', "max_tokens is an integer"),
        ('{"prompt": "x", "max_tokens": 0}', "at least 1"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=words):
        from_file(file, 1)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, words in (("nowhere", "No such file"), ("bytes", "not UTF-8")):
        with pytest.raises(InvalidRequestError, match=words):
            from_file(tmp_path / name, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"request_rate": 0.0}, "request_rate must be above 0"),
        ({"request_rate": math.nan}, "request_rate must be above 0"),
        ({"burstiness": 0.0, "request_rate": 1.0}, "burstiness must be a number above 0"),
        ({"timeout": math.inf}, "timeout must be a number above 0"),
        ({"range_ratio": 1.0}, "range_ratio must be in"),
        ({"range_ratio": math.nan}, "range_ratio must be in"),
        ({"request_rate": 1.0, "concurrency": 2}, "contradict"),
        ({"burstiness": 0.5}, "needs a finite request_rate"),
        ({"burstiness": 0.5, "concurrency": 2}, "needs a finite request_rate"),
        ({"vocab": 9}, "needs the completions endpoint"),
        ({"prompts": Path("x"), "prefix_len": 4}, "prefix_len has no meaning"),
        ({"slo": ("itl:5",)}, "slo cannot be read"),
        ({"slo": ("ttft:5", "ttft:6")}, "slo cannot be read"),
        ({"slo": ("ttft:nan",)}, "slo cannot be read"),
        ({"slo": ("ttft",)}, "slo cannot be read"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        BenchSettings(**settings)


def test_messages_need_the_chat_endpoint(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    assert len(asked_prompts(BenchSettings(prompts=file))) == 1
    with pytest.raises(InvalidRequestError, match="holds messages"):
        asked_prompts(BenchSettings(prompts=file, endpoint="completions"))


def test_bodies_say_what_was_asked_and_no_more() -> None:
    body = request_body(BenchSettings(model="m"), Prompt("hello", 8), 3)
    always = {"model": "m", "max_tokens": 8, "temperature": 0.0, "stream": True}
    always |= {"stream_options": {"include_usage": True}}
    assert body == {**always, "messages": [{"role": "user", "content": "hello"}]}
    settings = BenchSettings(model="m", endpoint="completions", ignore_eos=True, temperature=0.5, seed=40)
    body = request_body(settings, Prompt([1, 2], 8), 3)
    assert body == {**always, "temperature": 0.5, "prompt": [1, 2], "ignore_eos": True, "seed": 43}


def test_a_plan_is_open_or_closed() -> None:
    asked = [Prompt("a", 1)] * 3
    closed = plan(BenchSettings(concurrency=2), asked)
    opened = plan(BenchSettings(request_rate=2.0, endpoint="completions"), asked)
    assert (closed.concurrency, closed.arrivals_ns, closed.path) == (2, None, "/v1/chat/completions")
    assert opened.arrivals_ns == arrival_times_ns(3, 2.0, 1.0, 0) and opened.path == "/v1/completions"


def test_a_workload_is_its_plan() -> None:
    """Request by request, as words or as ids; what is given turns its knobs, what is not stays its own."""
    settings = BenchSettings(workload="bursty", num_requests=6, seed=3)
    workload = generate("bursty", sessions=6, seed=3, output_len=64)
    asked = asked_prompts(settings)
    assert [len(str(prompt.content).split()) for prompt in asked] == [*workload.prompt_lens().values()]
    assert [prompt.output_len for prompt in asked] == [request.output_len for request in workload.requests]
    assert plan(settings, asked).arrivals_ns == [request.arrival_ns for request in workload.requests]
    assert max(plan(settings, asked).arrivals_ns or []) > 0  # the workload's own rate
    ids = BenchSettings(workload="rag", num_requests=3, vocab=50, endpoint="completions", concurrency=2)
    first = generate("rag", sessions=3, vocab=50, output_len=64, concurrency=2).requests[0]
    assert asked_prompts(ids)[0].content == [token for part in first.parts for token in part.token_ids]
    assert plan(ids, asked_prompts(ids)).concurrency == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workload": "multi_turn"}, "need earlier answers"),
        ({"workload": "ragg"}, "rag"),
    ],
)
def test_a_workload_that_cannot_be_sent_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(NanoVLLMError, match=words):
        asked_prompts(BenchSettings(**settings))


@pytest.mark.parametrize("more", [{"input_len": 5}, {"prefix_len": 5}, {"prompts": Path("a")}])
def test_a_workload_has_lengths_of_its_own(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"own|no meaning"):
        BenchSettings(workload="rag", **more)
