"""The figures of a load run: against their definitions, on outcomes with known times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.lab.load import Exchange
from nanovllm.lab.load_report import meets, report
from nanovllm.lab.outcome import Outcome, judge
from nanovllm.lab.streamed_answer import Usage
from nanovllm.observe.statistics import distribution, parse_slo, percentile
from tests.lab.scripted_server import DONE, ROLE, event, piece, usage

MS = 10**6
TIMES = st.integers(0, 10**12)


def exchange(*chunks: tuple[int, bytes], **more: object) -> Exchange:
    """One that was sent at 1 ms and answered with 200; times in ms."""
    kept = [(at * MS, chunk) for at, chunk in chunks]
    fields = {"sent_ns": MS, "ended_ns": 100 * MS, "status": 200, "content_type": "text/event-stream", **more}
    return Exchange(0, None, chunks=kept, **fields)  # type: ignore[arg-type]


def test_the_definitions_on_known_times() -> None:
    """Sent at 1; text at 11, 21, 41; finish reason at 51; five tokens."""
    chunks = ((5, ROLE), (11, piece("a")), (21, piece("b")), (41, piece("c")), (51, piece("", "stop")))
    outcome = judge(exchange(*chunks, (60, usage(7, 5, 3) + DONE)))
    assert (outcome.verdict, outcome.reason, outcome.output_tokens) == ("completed", "stop", 5)
    assert outcome.ttft_ns == 10 * MS and outcome.e2e_ns == 50 * MS
    assert outcome.gaps_ns == [10 * MS, 20 * MS]
    assert outcome.tpot_ns == (50 - 10) * MS / (5 - 1)
    document = report([outcome], {})
    assert document["tokens"]["prompt"] == 7 and document["tokens"]["cached"] == 3
    assert document["throughput"]["output_tokens_per_s"] == pytest.approx(5 / 0.099, rel=1e-4)
    assert document["throughput"]["total_tokens_per_s"] == pytest.approx(12 / 0.099, rel=1e-4)
    assert any("1.67 tokens" in sentence for sentence in document["remarks"])


def test_without_usage_chunks_are_counted_and_it_is_said() -> None:
    outcome = judge(exchange((2, piece("a") + piece("b")), (3, piece("c", "length"))))
    assert (outcome.verdict, outcome.reason, outcome.output_tokens) == ("completed", "length", 3)
    document = report([outcome], {})
    assert document["tokens"]["without_usage"] == 1 and document["tokens"]["chunks_in_one_read"] == 1
    assert any("without usage" in sentence for sentence in document["remarks"])


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        (exchange(status=503), "rejected", "503"),
        (exchange(status=429, failure="cut"), "rejected", "429"),
        (exchange(status=404), "failed", "http_404"),
        (exchange(status=None, failure="timeout"), "failed", "timeout"),
        (exchange(content_type="application/json"), "failed", "not_sse"),
        (exchange((2, piece("a"))), "failed", "cut"),
        (exchange((2, piece("a")), failure="timeout"), "failed", "timeout"),
        (exchange((2, piece("a", "stop")), failure="cut"), "failed", "cut"),
        (exchange((2, piece("a") + DONE), failure="timeout"), "completed", "none given"),  # it never closed
        (exchange((2, event(b"{"))), "failed", "not_json"),
        (exchange((2, piece("a") + event({"error": {"message": "m", "code": "draining"}}))), "failed", "draining"),
    ],
)
def test_verdicts(found: Exchange, verdict: str, reason: str) -> None:
    outcome = judge(found)
    assert (outcome.verdict, outcome.reason) == (verdict, reason)


@given(st.lists(st.floats(0, 1e12), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], percent: int) -> None:
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


@given(st.lists(TIMES))
def test_a_distribution_is_ordered_and_counts_all(values: list[int]) -> None:
    found = distribution(values)
    assert found["count"] == len(values)
    if values:
        assert found["p50"] <= found["p90"] <= found["p99"] <= found["max"] == round(max(values) / MS, 3)
        assert min(values) / MS - 0.001 <= found["mean"] <= found["max"] + 0.001
    else:
        assert set(found.values()) == {0, None}


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    verdict = draw(st.sampled_from(["completed", "rejected", "failed"]))
    sent = draw(TIMES)
    text = sorted(draw(st.lists(TIMES, max_size=4)))
    text_ns = [sent + at for at in text] if verdict != "rejected" else []
    counts = Usage(*(draw(st.none() | st.integers(0, 2**53 - 1)) for _ in range(3)))
    last = text_ns[-1] if text_ns else draw(st.none() | st.just(sent))
    late = draw(st.none() | TIMES)
    reason = draw(st.sampled_from(["a", "b"]))
    return Outcome(verdict, reason, sent, max([sent, *text_ns]), late, text_ns, last, counts)


@given(st.lists(outcomes()), st.floats(0.001, 1e7), st.floats(0.001, 1e7))
def test_nothing_is_lost_in_a_report(found: list[Outcome], ttft_ms: float, looser: float) -> None:
    document = report(found, {"ttft": ttft_ms}, wall_ns=10, cpu_ns=5)
    requests = document["requests"]
    assert requests["sent"] == len(found) == requests["completed"] + requests["rejected"] + requests["failed"]
    for verdict, reasons in (("rejected", "rejected_by_status"), ("failed", "failed_by_reason")):
        assert sum(requests[reasons].values()) == requests[verdict]
    completed = [o for o in found if o.verdict == "completed"]
    assert document["tokens"]["output"] == sum(o.output_tokens for o in completed)
    shown_chunks = document["tokens"]["text_chunks"] + requests["text_chunks_of_failed"]
    assert shown_chunks == sum(len(o.text_ns) for o in found)
    latency = document["latency_ms"]
    assert latency["ttft"]["count"] == len(completed) - document["tokens"]["without_text"]
    assert latency["itl"]["count"] == sum(max(0, len(o.text_ns) - 1) for o in completed)
    assert document["goodput"]["requests"] <= requests["completed"]
    wider = report(found, {"ttft": max(ttft_ms, looser)})["goodput"]["requests"]
    assert wider >= document["goodput"]["requests"]
    assert document["client"]["cpu_share_of_one_core"] == 0.5


def test_goodput_counts_those_that_meet_every_objective() -> None:
    fast = judge(exchange((5, piece("a")), (15, piece("b", "stop") + usage(1, 2) + DONE)))  # TTFT 4, TPOT 10, E2E 14
    slow = judge(exchange((50, piece("a")), (60, piece("b", "stop") + usage(1, 2) + DONE)))
    one = judge(exchange((5, piece("a", "length") + usage(1, 1) + DONE)))  # no TPOT
    mute = judge(exchange((5, piece("", "stop") + usage(1, 0) + DONE)))  # no TTFT
    assert [meets(o, {"ttft": 4.0}) for o in (fast, slow, one, mute)] == [True, False, True, False]
    assert [meets(o, {"tpot": 10.0}) for o in (fast, slow, one, mute)] == [True, True, True, False]
    assert not meets(fast, {"tpot": 9.9}) and not meets(fast, {"ttft": 4.0, "e2e": 13.0})
    goodput = report([fast, slow, one, mute], {"ttft": 4.0, "e2e": 14.0})["goodput"]
    assert goodput["requests"] == 2 and goodput["requests_per_s"] == round(2 / 0.099, 4)
    assert report([fast], {})["goodput"] is None


def test_the_client_says_when_it_was_the_bottleneck() -> None:
    def client(late_ms: list[int], cpu_ns: int = 1, *, burst: bool = False) -> dict[str, object]:
        found = [
            Outcome("completed", "stop", (0 if burst else at) + late * MS, 10**9, late * MS)
            for at, late in enumerate(late_ms)
        ]
        return report(found, {}, wall_ns=100, cpu_ns=cpu_ns)["client"]

    assert not client([1, 2, 3])["is_bottleneck"]
    assert client([1, 2, 30])["is_bottleneck"]
    assert not client([1, 2, 30], burst=True)["is_bottleneck"]  # all at once is never on time
    assert client([1, 2, 3], cpu_ns=90)["is_bottleneck"]
    assert client([1, 2, 30])["lateness_ms"]["p99"] == 30.0  # type: ignore[index]


def test_objectives_are_read() -> None:
    assert parse_slo(["ttft:500", "tpot:50.5"]) == {"ttft": 500.0, "tpot": 50.5}
    assert math.isclose(parse_slo(["e2e:1e3"])["e2e"], 1000)
