"""Where time goes: a delay put into one stage is found in that term, and in no other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.clock import VirtualClock
from nanovllm.core.events import STAGES, EventBus, RequestEvent
from nanovllm.core.timeline import Timeline
from nanovllm.models.byte_tokenizer import ByteTokenizer
from tests.engine.fakes import FakeStatePlane, Load
from tests.engine.helpers import Bench, Injected, greedy, make_bench

DELAY = 5_000_000
PROMPT = list(range(10))


class SlowTokenizer(ByteTokenizer):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self.clock = clock

    def encode(self, text: str, **options: bool) -> list[int]:
        self.clock.advance(DELAY)
        return super().encode(text, **options)


def finish(bench: Bench, prompt: Any = PROMPT, tokens: int = 4, **request: Any) -> Timeline:
    request_id = bench.engine.add_request(prompt, greedy(tokens), **request)
    return bench.drain()[request_id].timeline


def delay_on(bench: Bench, owner: Any, name: str, when: Any = lambda *a, **k: True) -> None:
    """Let DELAY pass inside a method whenever `when` its arguments says so."""
    inner = getattr(owner, name)

    def slow(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            bench.clock.advance(DELAY)
        return inner(*args, **options)

    setattr(owner, name, slow)


def terms(t: Timeline) -> dict[str, int]:
    """Every term that a delay may land in; sub-terms of T_queue under their own names."""
    assert t.ttft_ns is not None and t.end_to_end_ns is not None
    return {
        "queue": t.t_queue_ns or 0,
        "intake": t.t_intake_ns or 0,
        "state": t.state_wait_ns,
        "schedule": t.t_schedule_ns or 0,
        "prefill": t.t_prefill_ns or 0,
        "return": t.t_return_ns or 0,
        "decode": sum(t.decode_gaps_ns),
        "stream": t.t_stream_ns or 0,
    }


def only(**expected: int) -> dict[str, int]:
    return {"queue": 0, "intake": 0, "state": 0, "schedule": 0, "prefill": 0, "return": 0, "decode": 0, "stream": 0,
            **expected}  # fmt: skip


def test_without_delays_every_term_is_zero() -> None:
    assert terms(finish(make_bench())) == only()


def test_a_slow_tokenizer_is_intake_inside_queue() -> None:
    clock = VirtualClock()
    bench = make_bench(clock=clock, tokenizer=SlowTokenizer(clock), vocab_size=260)
    assert terms(finish(bench, "hello")) == only(queue=DELAY, intake=DELAY)


def test_waiting_in_the_queue_is_queue_alone() -> None:
    bench = make_bench()
    request_id = bench.engine.add_request(PROMPT, greedy(4))
    bench.clock.advance(DELAY)
    assert terms(bench.drain()[request_id].timeline) == only(queue=DELAY)


def test_a_slow_load_of_state_is_state_inside_queue() -> None:
    bench = make_bench(kv=lambda device, runner: FakeStatePlane(device, lambda seq: Load(3), runner.write))
    request_id = bench.engine.add_request(PROMPT, greedy(4))
    bench.step()
    bench.clock.advance(DELAY)
    timeline = bench.drain()[request_id].timeline
    assert terms(timeline) == only(queue=DELAY, state=DELAY)


def test_a_slow_match_is_schedule() -> None:
    bench = make_bench()
    delay_on(bench, bench.scheduler.kv, "match")
    assert terms(finish(bench)) == only(schedule=DELAY)


def test_a_slow_forward_pass_is_prefill_or_decode() -> None:
    bench = make_bench()
    delay_on(bench, bench.runner, "launch", lambda batch: len(batch.token_ids) > 1)
    first = finish(bench)
    assert terms(first) == only(prefill=DELAY) and first.t_prefill_running_ns == DELAY
    bench = make_bench()
    delay_on(bench, bench.runner, "launch", lambda batch: len(batch.token_ids) == 1)
    second = finish(bench)
    assert terms(second) == only(decode=3 * DELAY) and second.decode_gaps_ns == [DELAY] * 3


def test_gaps_between_chunks_are_prefill_but_not_running() -> None:
    bench = make_bench(max_prefill_chunk=4)
    request_id = bench.engine.add_request(PROMPT, greedy(4))
    for _ in range(3):
        bench.step()
        bench.clock.advance(DELAY if bench.engine.scheduler.running[0].is_prefilling else 0)
    timeline = bench.drain()[request_id].timeline
    assert terms(timeline) == only(prefill=2 * DELAY) and len(timeline.prefill_runs) == 3
    assert (timeline.t_prefill_running_ns, timeline.t_prefill_waiting_ns) == (0, 2 * DELAY)


@pytest.mark.parametrize(("token", "term"), [(1, "return"), (4, "stream")])
def test_a_slow_hand_over_is_return_first_and_stream_last(token: int, term: str) -> None:
    bench = make_bench()
    delay_on(bench, bench.engine.marks, "handed_over", lambda seq: seq.num_completion_tokens == token)
    assert terms(finish(bench)) == only(**{term: DELAY})


def test_a_slow_hand_over_between_tokens_is_decode() -> None:
    bench = make_bench()
    delay_on(bench, bench.engine.marks, "handed_over", lambda seq: seq.num_completion_tokens == 2)
    assert terms(finish(bench)) == only(decode=DELAY)


def test_one_token_has_no_gaps_and_nothing_to_stream() -> None:
    timeline = finish(make_bench(), tokens=1)
    assert timeline.decode_gaps_ns == [] and timeline.t_stream_ns == 0


def test_a_preemption_is_shown_inside_the_gap_it_makes() -> None:
    bench = make_bench(prefix_mode="off")
    request_id = bench.engine.add_request(PROMPT, greedy(6))
    for _ in range(3):
        bench.step()
    bench.scheduler.preempt(bench.scheduler.running[0])
    bench.clock.advance(DELAY)
    timeline = bench.drain()[request_id].timeline
    assert terms(timeline) == only(decode=DELAY) and len(timeline.preempted_ns) == 1
    assert len(timeline.prefill_runs) == 2 and timeline.t_prefill_running_ns == 0, "the second run is not T_prefill"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=6),
    st.sampled_from(["mixed", "separate"]),
    st.sampled_from([None, 3, 7]),
    st.integers(12, 40),
)
def test_the_terms_add_up_to_the_nanosecond(
    work: list[tuple[int, int, int]], mode: str, chunk: int | None, num_blocks: int
) -> None:
    """TTFT is the sum of its four terms, end-to-end of TTFT, gaps and T_stream, whatever happened between."""
    bench = make_bench(num_blocks=num_blocks, simulated=True, mode=mode, max_prefill_chunk=chunk)
    ids = [bench.engine.add_request([i] * length, greedy(tokens, n=n)) for i, (length, tokens, n) in enumerate(work)]
    finals = bench.drain()
    for request_id in ids:
        for completion in finals[request_id].completions:
            t = completion.timeline
            parts = [t.t_queue_ns, t.t_schedule_ns, t.t_prefill_ns, t.t_return_ns]
            assert all(part is not None and part >= 0 for part in [*parts, t.t_stream_ns, *t.decode_gaps_ns])
            assert t.ttft_ns == sum(part or 0 for part in parts)
            assert t.end_to_end_ns == (t.ttft_ns or 0) + sum(t.decode_gaps_ns) + (t.t_stream_ns or 0)
            assert len(t.decode_gaps_ns) == len(completion.token_ids) - 1
            assert t.label == "simulated" and t.as_dict()["ttft_ns"] == t.ttft_ns


AFTER = {
    None: {"entered"},
    "entered": {"queued", "rejected"},
    "queued": {"scheduled", "loading", "aborted", "failed"},
    "loading": {"scheduled", "loading", "aborted"},
    "scheduled": {"prefill_begin", "decode_step", "preempted", "aborted", "failed"},
    "prefill_begin": {"prefill_chunk", "prefill_end", "failed"},
    "prefill_chunk": {"prefill_chunk", "prefill_end", "preempted", "aborted", "failed"},
    "prefill_end": {"first_token", "decode_step", "output_complete"},
    "first_token": {"first_handover", "aborted", "failed"},
    "first_handover": {"decode_step", "preempted", "output_complete", "aborted", "failed"},
    "decode_step": {"decode_step", "preempted", "output_complete", "aborted", "failed"},
    "preempted": {"scheduled", "loading", "aborted", "failed"},
    "output_complete": {"state_released"},
    "aborted": {"state_released"},
    "failed": {"state_released"},
    "state_released": set(),
    "rejected": set(),
}  # fmt: skip


def check_order(events: list[RequestEvent]) -> None:
    """Each request's stages follow the automaton, and its life ends exactly once."""
    last: dict[str, str] = {}
    for event in events:
        assert event.stage in AFTER[last.get(event.request_id)], f"{event.stage} after {last.get(event.request_id)}"
        if last.get(event.request_id) == "scheduled" and event.stage in ("decode_step", "failed"):
            assert event.epoch > 0, "only a preempted sequence finds all its KV again and has nothing to prefill"
        last[event.request_id] = event.stage
    assert set(last.values()) <= {"state_released", "rejected"}


def test_the_automaton_knows_every_stage() -> None:
    assert set(AFTER) - {None} == set(STAGES)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from(["abort", "preempt", "fail", "none"]), st.integers(0, 5)), max_size=20),
)
def test_stages_come_in_a_legal_order(work: list[tuple[int, int, bool]], deeds: list[tuple[str, int]]) -> None:
    bench = make_bench(num_blocks=14, max_prefill_chunk=6)
    ids = [f"r{i}" for i in range(len(work))]
    for i, (length, tokens, prefill_only) in enumerate(work):
        try:
            bench.engine.add_request([i % 3] * length, greedy(tokens), request_id=ids[i], prefill_only=prefill_only)
        except ValueError:
            assert length == 0
    for deed, index in deeds:
        if deed == "abort":
            bench.engine.abort(ids[index % len(ids)])
        elif deed == "preempt" and bench.scheduler.running:
            bench.scheduler.preempt(bench.scheduler.running[index % len(bench.scheduler.running)])
        elif deed == "fail":
            bench.runner.fail_next = Injected("injected")
        bench.step()
    bench.runner.fail_next = None
    bench.drain()
    check_order(bench.events())


def test_a_bus_that_overflows_says_how_much_it_lost() -> None:
    bus = EventBus(VirtualClock(), capacity=4)
    reader = bus.reader()
    for i in range(10):
        bus.request(f"r{i}", "entered", 0, 0, 0)
    seen = reader.poll()
    assert [event.seq for event in seen] == [6, 7, 8, 9] and reader.dropped == 6 and reader.poll() == []
    assert bus.dropped == 6
    bus.request("r10", "entered", 0, 0, 0)
    assert [event.seq for event in reader.poll()] == [10] and bus.emitted == 11
    assert [event.seq for event in bus.reader(from_start=True).poll()] == [7, 8, 9, 10]


def test_timelines_do_not_depend_on_the_bus() -> None:
    small, large = (make_bench(simulated=True, event_capacity=n) for n in (1, 10_000))
    assert terms(finish(small)) == terms(finish(large))
