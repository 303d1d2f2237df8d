"""Calls on state from an event loop, while the engine steps in a thread or in a child process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.errors import ConfigError, InvalidRequestError, StateNotFoundError, StateRefusedError, UnhealthyError
from nanovllm.state.objects import Document, Session

ENDLESS = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [(7 * i + i * i) % 250 for i in range(70)]
Body = Callable[[AsyncEngine], Awaitable[None]]


@pytest.fixture
def with_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """Run coroutine functions, each with a fresh engine on the same folder."""

    def run(*bodies: Body) -> None:
        async def whole(body: Body) -> None:
            config = EngineConfig.from_kwargs(
                "tiny:random",
                dtype="float32",
                num_blocks=256,
                block_size=8,
                state_dir=str(tmp_path),
                state_load="always",
            )
            engine = AsyncEngine(config, in_process_of_its_own=getattr(request, "param", "") == "process")
            await engine.start()
            try:
                await asyncio.wait_for(body(engine), 60)
            finally:
                await engine.close()

        for body in bodies:
            asyncio.run(whole(body))

    return run


async def finished(stream: Any) -> Any:
    async for _ in stream:
        pass
    return stream.finished


@pytest.mark.parametrize("with_engine", ["thread", "process"], indirect=True)
def test_every_call_is_answered_between_the_steps_of_others(with_engine: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = engine.submit(PROMPT[::-1], ENDLESS)
        running = asyncio.create_task(finished(stream))
        call = engine.call_state
        session = Session([{"role": "user", "content": "hi"}], PROMPT[:9])
        ids = await asyncio.gather(
            call("put", obj=Document("a text"), metadata={"name": "doc", "version": "1"}),
            call("put", obj=PROMPT[:24], metadata={"name": "opening", "durable": True}),
            call("put", obj=session),
        )
        assert [state_id.receipt.reason for state_id in ids] == ["durable"] * 3
        assert (await call("get", state_id="doc", namespace="default")).text == "a text"
        assert await call("get", state_id=ids[2]) == session
        assert (await call("update", state_id=ids[0], obj=Document("another"), generation=1)).ok
        await finished(engine.submit(PROMPT, SHORT))
        match = await call("match", tokens=PROMPT)
        assert match.num_tokens == 64 and match.tiers[0] == "device"
        pinned = await call("pin", state_id=ids[1], device="gpu", ttl=60)
        assert pinned.ok and "3 of 3 blocks held" in pinned.reason
        explained = await call("explain", state_id=ids[1])
        assert [receipt.action for receipt in explained.receipts] == ["put", "pin"]
        bundle = await call("export", state_id=ids[0])
        assert (await call("find", state_id=await call("import_", bundle=bundle))).kind == "knowledge"
        # the import has the name and version of the original, and takes its place
        assert len(await call("ls", namespace="default")) == 3 and "disk" in (await call("top"))["tiers"]
        assert (await call("unpin", state_id=ids[1])).ok and (await call("drop", state_id=ids[2])).ok
        assert not running.done()
        stream.close()
        await running

    async def after(engine: AsyncEngine) -> None:
        """A restart: names and texts are there, KV is found on the disk."""
        assert (await engine.call_state("get", state_id="doc@1", namespace="default")).text == "another"
        done = await finished(engine.submit(PROMPT, SHORT))
        assert done.hit_tokens_by_tier == {"disk": 64} and done.cached_tokens == 64

    with_engine(body, after)


def test_refusals_arrive_as_the_stores_own_errors(with_engine: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        call = engine.call_state
        for verb, arguments, error in (
            ("get", {"state_id": "nobody"}, StateNotFoundError),
            ("plunder", {}, InvalidRequestError),
            ("pin", {"device": "gpu"}, InvalidRequestError),
            ("put", {"obj": object()}, TypeError),
            ("put", {"obj": "text", "metadata": {"colour": "red"}}, InvalidRequestError),
            ("evict", {"policy": "magic"}, ConfigError),
        ):
            with pytest.raises(error):
                await call(verb, **arguments)
        limit = await call("put", obj=PROMPT * 20)
        assert not (await call("pin", state_id=limit)).ok  # more than pins may hold
        await finished(engine.submit(PROMPT, SHORT))

    with_engine(body)


def test_a_pin_ends_in_time_while_the_engine_has_nothing_to_do(with_engine: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        state_id = await engine.call_state("put", obj=PROMPT[:24])
        await finished(engine.submit(PROMPT, SHORT))
        assert (await engine.call_state("pin", state_id=state_id, ttl=0.05)).ok
        for _ in range(200):
            receipts = (await engine.call_state("explain", state_id=state_id)).receipts
            if receipts[-1].action == "unpin":
                return
            await asyncio.sleep(0.02)
        raise AssertionError("still pinned")

    with_engine(body)


def test_a_call_under_way_fails_when_the_engine_ends(tmp_path: Path) -> None:
    async def whole() -> None:
        config = EngineConfig.from_kwargs("tiny:random", dtype="float32", num_blocks=16, state_dir=str(tmp_path))
        engine = AsyncEngine(config)
        await engine.start()
        call = asyncio.create_task(engine.call_state("top"))
        await asyncio.sleep(0)
        engine._is_closing = False
        engine._ended()
        with pytest.raises(UnhealthyError):
            await call
        await engine.close()

    asyncio.run(whole())


def test_a_refused_put_brings_its_receipt() -> None:
    from nanovllm.engine.state_calls import apply_call, call_of, result_of
    from nanovllm.state.store import StateStore
    from nanovllm.state.tiers.host import HostTier

    answers: list[Any] = []
    apply_call(StateStore([HostTier(10)]), call_of(7, "put", {"obj": "a text that is too long"}), answers.append)
    with pytest.raises(StateRefusedError) as refused:
        result_of(answers[0], "put")
    assert answers[0].call_id == 7 and refused.value.receipt is not None and not refused.value.receipt.ok


def test_a_bundle_that_no_frame_would_hold_is_refused_on_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent, it would end a child process's pipe."""
    from nanovllm.engine import state_calls
    from nanovllm.state.store import StateStore

    store, answers = StateStore.open(), []
    state_id = store.put("text")
    bundle = store.export(state_id)
    monkeypatch.setattr(state_calls, "WIRE_BYTES", len(bundle) - 1)
    with pytest.raises(InvalidRequestError, match="pass at once"):
        state_calls.call_of(1, "import_", {"bundle": bundle})
    state_calls.apply_call(store, state_calls.call_of(2, "export", {"state_id": state_id}), answers.append)
    with pytest.raises(InvalidRequestError, match="pass at once"):
        state_calls.result_of(answers[0], "export")
