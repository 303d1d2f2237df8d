"""The verb `written`: told once the blocks lie below, or after its time; no step waits for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.written import Written
from nanovllm.errors import InvalidRequestError
from tests.engine.helpers import greedy
from tests.engine.state_bench import HandLane, StateBench
from tests.engine.test_tiered_state import PROMPT

TINY: dict[str, Any] = {"dtype": "float32", "num_blocks": 64, "block_size": 8, "state_load": "always"}
LONG_PROMPT = [(7 * i + i * i) % 250 for i in range(70)]
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def slow_bench(**knobs: Any) -> tuple[StateBench, HandLane]:
    """A bench whose cellar writes when it is told to."""
    bench = StateBench(kv_tiers=("host", "cellar"), **knobs)
    lane = HandLane(bench.clock)
    lane.is_open = False
    bench.store.plane.places["cellar"].write_lane = lane
    return bench, lane


def ask(bench: StateBench, **arguments: Any) -> list[Written]:
    told: list[Written] = []
    bench.state.written.ask(told.append, **{"token_ids": PROMPT, **arguments})
    return told


def test_it_is_told_when_the_last_block_has_been_written_and_steps_go_on() -> None:
    bench, lane = slow_bench()
    bench.run(PROMPT, greedy(1))
    told = ask(bench)
    for _ in range(3):
        bench.engine.add_request([5, 6, 7], greedy(1))
        assert bench.bench.step() and not told and not bench.state.is_settled()
    lane.is_open = True
    for _ in range(4):
        lane.run()
        bench.bench.step()
    (written,) = told
    assert written == Written(28, {"device": 28, "host": 28, "cellar": 28}, True, 0.0)
    assert bench.state.is_settled()


def test_its_time_bounds_the_wait() -> None:
    bench, _ = slow_bench()
    bench.run(PROMPT, greedy(1))
    told = ask(bench, timeout=0.5)
    for _ in range(4):
        bench.bench.step()
    bench.clock.advance(499_000_000)
    bench.bench.step()
    assert not told
    bench.clock.advance(1_000_000)
    bench.bench.step()
    assert told == [Written(28, {"device": 28, "host": 28}, False, 500.0)]
    bench.bench.step()
    assert len(told) == 1


def test_what_is_asked_for_goes_first() -> None:
    bench, _ = slow_bench()
    backlog = bench.state.behind._backlogs["cellar"]
    bench.state.behind.write = lambda: None  # type: ignore[method-assign]  # the queues stand still
    bench.run(PROMPT[::-1], greedy(1))
    bench.run(PROMPT, greedy(1))
    ask(bench)
    assert tuple(backlog.waiting)[:7] == bench.store.plane.chain_of(PROMPT, "default")


@pytest.mark.parametrize("knobs", [{"kv_tiers": ()}, {}], ids=["no tier", "nothing computed"])
def test_it_is_told_at_once_where_nothing_is_on_its_way(knobs: dict[str, Any]) -> None:
    bench = StateBench(**knobs)
    if "kv_tiers" in knobs:
        bench.run(PROMPT, greedy(1))
    (written,) = ask(bench)
    assert written.is_complete and written.tokens_by_tier == ({"device": 28} if knobs else {})


def test_a_tier_that_fails_is_told_as_it_is() -> None:
    bench = StateBench()
    bench.cellar.is_failing = True
    bench.run(PROMPT, greedy(1))
    told = ask(bench)
    bench.write_all()
    (written,) = told
    assert not written.is_complete and written.tokens_by_tier == {"device": 28}


def test_a_shared_tier_is_not_waited_for_beside_one_of_our_own() -> None:
    bench, _ = slow_bench()
    bench.cellar.shared = True  # type: ignore[misc]
    written = bench.state.written
    written.__init__(bench.store, bench.state.behind, written._root_of, written._harmless)  # type: ignore[misc]
    bench.run(PROMPT, greedy(1))
    told = ask(bench)
    for _ in range(4):
        bench.bench.step()
    assert told and told[0].is_complete and "cellar" not in told[0].tokens_by_tier


@pytest.mark.parametrize("timeout", [-1, 11, float("nan"), "1", True])
def test_a_time_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        ask(StateBench(), timeout=timeout)


@pytest.mark.parametrize("ends", ["poll", "close"])
def test_an_answer_that_raises_takes_nobody_elses_with_it(ends: str) -> None:
    bench, lane = slow_bench()
    bench.run(PROMPT, greedy(1))

    def broken(written: Written) -> None:
        raise RuntimeError("whoever asked is gone")

    told: list[Written] = []
    for then in (broken, told.append, broken, told.append):
        bench.state.written.ask(then, token_ids=PROMPT)
    lane.is_open = True
    for _ in range(4 if ends == "poll" else 1):
        lane.run()
        bench.bench.step() if ends == "poll" else bench.state.close()
    assert len(told) == 2 and bench.state.counters.errors == 2 and bench.state.written.is_empty


def test_closing_answers_whoever_waits() -> None:
    bench, lane = slow_bench()
    bench.run(PROMPT, greedy(1))
    told = ask(bench)
    lane.is_open = True
    lane.run()
    bench.state.close()
    assert [written.is_complete for written in told] == [True]


@pytest.mark.parametrize("is_process", [False, True], ids=["thread", "process"])
def test_after_the_last_token_every_full_block_is_on_the_disk_while_others_decode(
    tmp_path: Path, is_process: bool
) -> None:
    async def whole() -> None:
        config = EngineConfig.from_kwargs("tiny:random", state_dir=str(tmp_path), **TINY)
        engine = AsyncEngine(config, in_process_of_its_own=is_process)
        await engine.start()
        engine.submit(LONG_PROMPT[::-1], ENDLESS)
        try:
            for salt in ("", "salt"):
                stream = engine.submit(LONG_PROMPT, SHORT, namespace="tenant", cache_salt=salt)
                tokens = [*LONG_PROMPT]
                async for deltas in stream:
                    tokens += [token for delta in deltas for token in delta.token_ids]
                told = await engine.call_state("written", token_ids=tokens, namespace="tenant", cache_salt=salt)
                computed = (len(tokens) - 1) // 8 * 8  # the last token has no KV
                assert told.is_complete and told.tokens_by_tier == {"device": computed, "disk": computed}
            nothing = await engine.call_state("written", token_ids=LONG_PROMPT)
            assert nothing.tokens_by_tier == {} and nothing.is_complete
            with pytest.raises(InvalidRequestError):
                await engine.call_state("written", token_ids=["a"])
        finally:
            await engine.close()

    asyncio.run(whole())
