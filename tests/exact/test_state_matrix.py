"""Kind x tier x hit length x what happened in between: float32, greedy, and every token that of a cold run.

A cell counts only where the hit came from its tier, whole: one that computed again would fail. Where a tier cannot
have kept anything (a device that was evicted or restarted, memory after a restart) nothing may be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from exact_harness import greedy
from state_cells import ALL_BYTES, Stage, World, stage

from nanovllm import LLM
from nanovllm.engine.parts import RequestArgs
from tests.state.servers import needs_server

LONG = (pytest.mark.long, pytest.mark.timeout(1800))
WORLDS = [  # model, block size, whether every token is a hit length or every block
    pytest.param(("tiny:random", 4, False), id="tiny"),
    pytest.param(("tiny:random", 4, True), id="tiny-every-token", marks=LONG),
    pytest.param(("smollm2", 16, False), id="smollm2", marks=[*LONG, pytest.mark.model]),
]
TIERS = ["device", "host", "disk", pytest.param("remote", marks=needs_server)]
LOST = {("device", "evicted"), ("device", "restarted"), ("host", "restarted")}
Found = tuple[LLM, Callable[[], object]]


@pytest.fixture(scope="module", params=WORLDS)
def world(request: Any) -> Iterator[World]:
    model, size, every_token = request.param
    if model == "smollm2":
        yield World(request.getfixturevalue("smollm2"), size, every_token)
        return
    with LLM(model, dtype="float32", block_size=size, num_blocks=64, prefix_mode="off", progress=False) as cold:
        yield World(cold, size, every_token)


@pytest.fixture(scope="module", params=TIERS)
def at(request: Any, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(world, request.param, tmp_path_factory.mktemp(request.param)) as one:
        yield one


def direct(at: Stage, state_id: str) -> Found:
    """It lies in the tier as the engine put it there."""
    return at.engine(), lambda: None


def evicted(at: Stage, state_id: str) -> Found:
    """The store makes room on the device before every question."""
    store = at.engine().state_store
    return at.engine(), lambda: store.evict(tier="device", bytes=ALL_BYTES)


def restarted(at: Stage, state_id: str) -> Found:
    """What one question has brought back is evicted before the next, where the restart lost it."""
    at.restart()
    llm = at.engine()
    return llm, lambda: (at.tier, "restarted") in LOST and llm.state_store.evict(tier=at.tier, bytes=ALL_BYTES)


def forked(at: Stage, state_id: str) -> Found:
    """The fork lives on alone."""
    store = at.engine().state_store
    fork = store.fork(state_id)
    assert store.drop(state_id).ok and store.find(fork).forked_from == state_id
    return at.engine(), lambda: None


def imported(at: Stage, state_id: str) -> Found:
    """Out of one engine's tier, into another one's."""
    store, elsewhere = at.engine().state_store, at.engine("elsewhere")
    there, namespace = elsewhere.state_store, store.find(state_id).namespace
    arrived = there.import_(store.export(state_id), {"namespace": namespace})
    if at.tier == "device":
        assert there.pin(arrived, device="gpu").ok and there.unpin(arrived).ok
    else:
        assert there.migrate(arrived, at.tier).ok
    return elsewhere, lambda: None


WAYS = {way.__name__: way for way in (direct, evicted, restarted, forked, imported)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["kv", "knowledge", "session"])
def test_whatever_is_found_the_tokens_are_those_of_a_cold_run(at: Stage, kind: str, way: str) -> None:
    world, kept, size = at.world, at.world.kept[kind], at.world.block_size
    world.num_cells += 1
    namespace = f"{way}-{world.num_cells}"
    llm, before_each = WAYS[way](at, at.keep(kept, namespace))
    for hit in kept.lengths(size, world.every_token):
        at.forget_device(llm)
        before_each()
        prompt = kept.prompt(hit)
        (final,) = llm.engine.generate([RequestArgs(prompt=prompt, sampling_params=greedy(3), namespace=namespace)])
        case = (at.tier, kind, way, hit)
        assert final.error is None and final.token_ids == world.expected(kept, hit), case
        found = min(len(kept.tokens) if hit < 0 else hit, len(prompt) - 1) // size * size
        is_there = found and (at.tier, way) not in LOST
        assert final.hit_tokens_by_tier == ({at.tier: found} if is_there else {}), case
        assert at.tier == "device" or not is_there or final.timeline.state_wait_ns > 0, case
