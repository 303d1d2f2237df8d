"""AsyncEngine against the real engine, in a thread and in a child process: streams, aborts, deadlines, ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from nanovllm import LLM
from nanovllm.config import EngineConfig
from nanovllm.core.grammar import Grammar
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.async_engine import MAX_RESTARTS, STEADY_S, AsyncEngine
from nanovllm.engine.engine_loop import EngineLoop
from nanovllm.engine.integrity import check_blocks
from nanovllm.engine.links import ProcessLink, ThreadLink
from nanovllm.engine.request_stream import RequestStream
from nanovllm.errors import (
    BusyError,
    ContextLengthError,
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    ModelNotFoundError,
    UnhealthyError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
Body = Callable[[AsyncEngine], Awaitable[None]]


def config(**settings: object) -> EngineConfig:
    return EngineConfig.from_kwargs("tiny:random", **{"dtype": "float32", "kv_memory": "4MiB", **settings})


class Running:
    """A started engine and the loop it lives in."""

    def __init__(self, own: bool, **settings: object) -> None:
        self.runner = asyncio.Runner()
        self.engine = AsyncEngine(config(**settings), in_process_of_its_own=own)
        self.runner.run(self.engine.start())

    def run(self, body: Body) -> None:
        self.runner.run(asyncio.wait_for(body(self.engine), 60))

    def close(self) -> None:
        with self.runner:
            self.runner.run(self.engine.close())
        assert self.engine.num_live == 0 and self.engine.state == "dead"


@pytest.fixture(params=["thread", "process"])
def with_engine(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run a coroutine function with an engine of its own; afterwards everything must be at rest."""

    def run(body: Body, **settings: object) -> None:
        with contextlib.closing(Running(request.param == "process", **settings)) as running:
            running.run(body)

    return run


@pytest.fixture(params=["thread", "process"], scope="module")
def with_shared(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """The same with one engine for each settings; it must be at rest after every test."""
    kept: dict[str, Running] = {}

    def run(body: Body, **settings: object) -> None:
        key = repr(settings)
        if key not in kept:
            kept[key] = Running(request.param == "process", **settings)
        kept[key].run(body)
        kept[key].run(at_rest)
        assert kept[key].engine.num_live == 0

    yield run
    for one in kept.values():
        one.close()


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token for deltas in [d async for d in stream] for delta in deltas for token in delta.token_ids]


async def at_rest(engine: AsyncEngine) -> None:
    """Wait until the engine says that every block is free."""
    for _ in range(400):
        stats = engine.stats
        if stats.free_blocks == stats.num_blocks and not (stats.running or stats.waiting or stats.loading):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not at rest: {engine.stats}")


def test_streams_equal_the_offline_engine(with_shared: Callable[..., None]) -> None:
    prompts = [f"prompt number {i} " * (i + 1) for i in range(6)]
    with LLM("tiny:random", dtype="float32", kv_memory="4MiB") as llm:
        expected = [out.token_ids for out in llm.generate(prompts, GREEDY)]

    async def body(engine: AsyncEngine) -> None:
        streams = [engine.submit(engine.tokenizer.encode(prompt), GREEDY) for prompt in prompts]
        assert await asyncio.gather(*map(tokens_of, streams)) == expected
        for stream, prompt in zip(streams, prompts, strict=True):
            finished = stream.finished
            assert finished is not None and finished.error is None and finished.timings is not None
            assert (finished.prompt_tokens, finished.completion_tokens) == (len(engine.tokenizer.encode(prompt)), 12)
            timings = finished.timings
            assert timings.ttft_ns == sum(
                (timings.t_queue_ns, timings.t_schedule_ns, timings.t_prefill_ns, timings.t_return_ns)  # type: ignore[arg-type]
            )

    with_shared(body)


def test_a_slow_consumer_gets_everything_merged(with_shared: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        pieces = []
        async for deltas in stream:
            pieces.append(deltas)
            await asyncio.sleep(0.2)
        assert sum(len(delta.token_ids) for deltas in pieces for delta in deltas) == 50
        assert len(pieces) < 50

    with_shared(body)


def test_an_early_close_frees_the_blocks_within_two_steps(with_shared: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = engine.submit([1] * 100, ENDLESS)
        async for _ in stream:
            break
        stream.close()
        await asyncio.sleep(0)
        steps = engine.stats.steps
        await at_rest(engine)
        assert engine.stats.steps < steps + 50  # of the 1,900 it would have taken
        stream.close()

    with_shared(body)


def test_what_can_never_be_served_is_refused_at_once(with_shared: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(ContextLengthError):
            engine.submit([1] * 5000, GREEDY)
        with pytest.raises(InvalidRequestError):
            engine.submit([], GREEDY)
        assert engine.num_live == 0

    with_shared(body)


def test_deadlines(with_shared: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        long = engine.submit([1] * 16, ENDLESS, timeout_s=0.4)
        waiting = engine.submit([2] * 16, GREEDY, queue_timeout_s=0.2)
        with pytest.raises(BusyError, match="waited"):
            await tokens_of(waiting)
        with pytest.raises(DeadlineError):
            await tokens_of(long)
        await at_rest(engine)
        assert len(await tokens_of(engine.submit([3], GREEDY, queue_timeout_s=30, timeout_s=30))) == 12

    with_shared(body, max_num_seqs=1)


def test_on_start_is_called_once_when_the_request_left_the_queue(with_shared: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        calls: list[str] = []
        first = engine.submit([1], GREEDY, on_start=lambda: calls.append("first"))
        second = engine.submit([2], GREEDY, on_start=lambda: calls.append("second"))
        await tokens_of(first)
        await tokens_of(second)
        assert calls == ["first", "second"]

    with_shared(body, max_num_seqs=1)


def test_draining_lets_the_living_end_and_takes_no_more(with_engine: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = engine.submit([1], GREEDY)
        engine.drain()
        with pytest.raises(DrainingError):
            engine.submit([1], GREEDY)
        reading = asyncio.create_task(tokens_of(stream))
        assert await engine.drained(30)
        assert len(await reading) == 12

    with_engine(body)


def test_what_lives_after_the_drain_fails(with_engine: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = engine.submit([1], ENDLESS)
        engine.drain()
        assert not await engine.drained(0.1)
        with pytest.raises(DrainingError):
            await tokens_of(stream)
        await at_rest(engine)

    with_engine(body)


def test_grammars_are_compiled_beside_the_engine(with_shared: Callable[..., None]) -> None:
    """A sound one shapes the text, a broken one is this request's error, an early close is harmless."""

    async def text_of(stream: RequestStream) -> str:
        return "".join([delta.text async for deltas in stream for delta in deltas])

    async def body(engine: AsyncEngine) -> None:
        shaped = SamplingParams(max_tokens=40, seed=1, grammar=Grammar.choice(["left", "right"]))
        broken = SamplingParams(max_tokens=40, grammar=Grammar.regex("(unclosed"))
        streams = [engine.submit([5, 6], params) for params in (shaped, broken, GREEDY)]
        engine.submit([7], SamplingParams(grammar=Grammar.regex("a+"))).close()
        assert await text_of(streams[0]) in ("left", "right")
        with pytest.raises(InvalidRequestError, match="grammar"):
            await text_of(streams[1])
        await text_of(streams[2])
        await at_rest(engine)

    with_shared(body)


def test_aborts_at_random_moments_leave_nothing(with_shared: Callable[..., None]) -> None:
    """Double aborts, aborts after the end, aborts of unknown ids: 1,000 of them."""
    rng = random.Random(7)

    async def body(engine: AsyncEngine) -> None:
        async def one(i: int) -> None:
            stream = engine.submit([rng.randrange(256) for _ in range(rng.randrange(1, 60))], GREEDY)
            stop_after = rng.randrange(0, 14)
            async for _ in stream:
                stop_after -= 1
                if stop_after <= 0:
                    break
            for _ in range(rng.randrange(1, 4)):
                stream.close()
            engine._forget(f"req-{i}", True)  # of an id that never was

        for _ in range(5):
            await asyncio.gather(*(one(i) for i in range(70)))
        await at_rest(engine)

    with_shared(body)


def test_a_model_that_is_not_there_is_said_at_start() -> None:
    async def body(own: bool) -> None:
        engine = AsyncEngine(EngineConfig.from_kwargs("/no/such/model"), in_process_of_its_own=own)
        with pytest.raises(ModelNotFoundError):
            await engine.start()
        await engine.close()

    asyncio.run(body(False))
    asyncio.run(body(True))


def test_three_bad_steps_make_it_unhealthy() -> None:
    """A runner that always fails: its requests fail, then the engine takes no more, and says so."""

    async def body() -> None:
        engine = AsyncEngine(config())
        await engine.start()
        engine_loop = inner_loop(engine)

        def broken(batch: object) -> object:
            raise OSError("the device is gone")

        engine_loop.engine.runner.launch = broken  # type: ignore[method-assign]
        for _ in range(3):
            with pytest.raises((UnhealthyError, Exception)):
                await tokens_of(engine.submit([1], GREEDY))
        for _ in range(100):
            if engine.state == "unhealthy":
                break
            await asyncio.sleep(0.02)
        assert engine.state == "unhealthy"
        with pytest.raises(UnhealthyError):
            engine.submit([1], GREEDY)
        await asyncio.sleep(1.2)
        assert engine.heartbeat_age_s < 1.2  # it lives, and refuses
        await engine.close()

    asyncio.run(body())


def test_a_step_that_does_not_end_holds_no_request_past_its_deadline() -> None:
    async def body() -> None:
        engine = AsyncEngine(config())
        await engine.start()
        runner = inner_loop(engine).engine.runner
        launch = runner.launch

        def slow(batch: object) -> object:
            time.sleep(1.5)
            return launch(batch)  # type: ignore[arg-type]

        runner.launch = slow  # type: ignore[method-assign]
        stream = engine.submit([1], GREEDY, timeout_s=0.3)
        with pytest.raises(DeadlineError):
            await tokens_of(stream)
        assert engine.heartbeat_age_s < 1.5
        runner.launch = launch  # type: ignore[method-assign]
        assert len(await tokens_of(engine.submit([2], GREEDY))) == 12
        await at_rest(engine)
        loop = inner_loop(engine)
        check_blocks(loop.engine.scheduler.kv.block_manager, loop.engine.scheduler.live())  # type: ignore[attr-defined]
        await engine.close()

    asyncio.run(body())


def inner_loop(engine: AsyncEngine) -> EngineLoop:
    """The engine's own loop, for tests that break it."""
    assert isinstance(engine.link, ThreadLink) and engine.link.engine_loop is not None
    return engine.link.engine_loop


def killed_and_back(times: int) -> None:
    async def body() -> None:
        engine = AsyncEngine(config(), in_process_of_its_own=True)
        await engine.start()
        assert isinstance(engine.link, ProcessLink)
        for _ in range(times):
            engine._restarts, engine._ready_s = MAX_RESTARTS, engine._ready_s - STEADY_S  # it has lived for long
            stream = engine.submit([1], ENDLESS)
            async for _ in stream:
                break
            other = engine.submit([2], ENDLESS)
            os.kill(engine.link.pid or 0, signal.SIGKILL)
            with pytest.raises(UnhealthyError):
                await asyncio.wait_for(tokens_of(other), 5)
            with pytest.raises((DrainingError, UnhealthyError)):
                engine.submit([1], GREEDY)
            while engine.state != "ready":
                await asyncio.sleep(0.05)
            assert len(await tokens_of(engine.submit([3], GREEDY))) == 12
        await engine.close()

    asyncio.run(asyncio.wait_for(body(), 250))


def test_a_killed_engine_process_fails_its_requests_and_comes_back() -> None:
    killed_and_back(1)


@pytest.mark.long
def test_a_killed_engine_process_comes_back_twenty_times() -> None:
    killed_and_back(20)


def test_nothing_outlives_its_caller() -> None:
    """A caller that is killed leaves no engine process behind."""
    import subprocess
    import sys

    code = (
        "import asyncio, os, signal\n"
        "from nanovllm.config import EngineConfig\n"
        "from nanovllm.engine.async_engine import AsyncEngine\n"
        "async def main():\n"
        "    engine = AsyncEngine(EngineConfig.from_kwargs('tiny:random'), in_process_of_its_own=True)\n"
        "    await engine.start()\n"
        "    print(engine.link.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    child = int(done.stdout.split()[-1])
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}"):
            return
        time.sleep(0.1)
    raise AssertionError("the engine's process lives on")
