"""Log points and stop watches: each on alone, and what is off is the method itself."""

from __future__ import annotations

import logging
import re

import pytest

from nanovllm.config import LOGGED_CALLS
from nanovllm.core.events import BLOCK_CALLS
from nanovllm.engine.block_log import BlockTimes, log_calls
from nanovllm.engine.block_manager import BlockManager
from tests.engine.helpers import Bench, greedy, make_bench

LINES = {
    "can_allocate": r"can_allocate r blocks=3 free=16 -> True",
    "allocate": r"allocate r blocks=3 free=13",
    "deallocate": r"deallocate r blocks=4 free=16",
}


@pytest.fixture
def bench() -> Bench:
    return make_bench(num_blocks=16, simulated=True)


def lines_of(bench: Bench, caplog: pytest.LogCaptureFixture) -> list[str]:
    """One request of twelve prompt tokens and four more: three blocks, then a fourth."""
    with caplog.at_level(logging.INFO, "nanovllm"):
        bench.engine.add_request([1] * 12, greedy(4), request_id="r")
        bench.drain()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", LOGGED_CALLS)
def test_each_log_point_is_on_alone(bench: Bench, caplog: pytest.LogCaptureFixture, name: str) -> None:
    others = set(BLOCK_CALLS) - {name}
    before = {other: getattr(bench.manager, other) for other in others}
    log_calls(bench.manager, [name])
    assert all(getattr(bench.manager, other) == before[other] for other in others)
    lines = lines_of(bench, caplog)
    assert lines and all(line.startswith(name + " ") for line in lines)
    assert re.fullmatch(LINES[name], lines[0])


def test_all_and_none(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    log_calls(bench.manager, [])
    assert all(name not in vars(bench.manager) for name in BLOCK_CALLS), "what is off is the class's own method"
    log_calls(bench.manager, LOGGED_CALLS)
    assert {line.split()[0] for line in lines_of(bench, caplog)} == set(LOGGED_CALLS)


def test_a_refusal_is_logged_as_one(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    log_calls(bench.manager, ["can_allocate"])
    with caplog.at_level(logging.INFO, "nanovllm"):
        bench.engine.add_request([1] * 40, greedy(8), request_id="big")
        bench.engine.add_request([2] * 40, greedy(8), request_id="late")
        bench.drain()
    assert any(re.fullmatch(r"can_allocate late blocks=10 free=\d+ -> False", r.getMessage()) for r in caplog.records)


def test_logs_change_no_token(bench: Bench) -> None:
    plain = make_bench(num_blocks=16, simulated=True)
    log_calls(bench.manager, LOGGED_CALLS)
    BlockTimes(bench.manager, bench.clock)
    for each in (bench, plain):
        each.engine.add_request([1] * 12, greedy(6), request_id="r")
    assert bench.drain()["r"].token_ids == plain.drain()["r"].token_ids
    assert bench.clock.now_ns() == plain.clock.now_ns()


def test_each_stop_watch_counts_its_own_call(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes another time on the virtual clock; what was taken counts from zero again."""
    for cost, name in enumerate(BLOCK_CALLS, 1):
        method = getattr(BlockManager, name)

        def slow(*arguments: object, cost: int = cost, method: object = method, **options: object) -> object:
            bench.clock.advance(cost)
            return method(*arguments, **options)  # type: ignore[operator]

        monkeypatch.setattr(BlockManager, name, slow)
    times = BlockTimes(bench.manager, bench.clock)
    bench.engine.marks.block_times = times
    bench.engine.add_request([1] * 12, greedy(4), request_id="r")
    bench.drain()
    told = [
        event.block_ns for event in bench.engine.events.reader(from_start=True).poll() if hasattr(event, "block_ns")
    ]
    first = dict(zip(BLOCK_CALLS, told[0] or (), strict=True))
    assert first == {"can_allocate": 1, "allocate": 2, "deallocate": 0, "hash_blocks": 0}
    assert dict(zip(BLOCK_CALLS, times.take(), strict=True))["deallocate"] == 3
    assert times.take() == (0, 0, 0, 0)
