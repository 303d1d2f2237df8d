"""Names and the device: what pins, evictions, drops and sessions do with an engine's blocks."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.engine.integrity import check_blocks
from tests.engine.helpers import answer, greedy
from tests.engine.state_bench import StateBench
from tests.engine.test_tiered_state import OTHER, PROMPT, VOCAB, warm


def test_a_pin_loads_holds_and_gives_back() -> None:
    bench = warm()
    state_id = bench.store.put(PROMPT[:16])
    receipt = bench.store.pin(state_id, device="gpu")
    assert receipt.ok and "4 of 4 blocks held" in receipt.reason
    check_blocks(bench.manager, [])
    assert len(bench.manager.used_block_ids) == 4 and len(bench.manager.leases) == 1
    for i in range(5):  # more than the rest of the pool
        request_id = bench.engine.add_request([i, *PROMPT[::-1]], greedy(2))
        assert bench.bench.drain_but(*bench.manager.leases)[request_id].token_ids
    request_id = bench.engine.add_request(PROMPT, greedy(2))
    final = bench.bench.drain_but(*bench.manager.leases)[request_id]
    assert final.hit_tokens_by_tier["device"] >= 16
    assert bench.store.unpin(state_id).ok and not bench.manager.used_block_ids
    assert [r.action for r in bench.store.explain(state_id).receipts] == ["put", "pin", "unpin"]


def test_a_pin_before_the_tokens_were_computed_holds_them_from_then_on() -> None:
    bench = StateBench()
    state_id = bench.store.put(PROMPT[:8])
    assert "0 of 2 blocks held" in bench.store.pin(state_id).reason
    bench.engine.add_request(PROMPT, greedy(2))
    while not bench.engine.is_finished():
        bench.bench.step()
    (lease,) = bench.manager.leases
    assert len(lease.block_ids) == 2 and lease.block_ids == sorted(bench.manager.used_block_ids)


@pytest.mark.parametrize("verb", ["pin", "export", "verify"])
def test_a_verb_that_reads_a_slow_tier_holds_up_no_step(verb: str) -> None:
    bench = warm()
    state_id = bench.store.put(PROMPT[:16])
    told: list[Any] = []
    bench.lane.is_open = False
    arguments = {} if verb == "verify" else {"state_id": state_id}
    bench.store.later(verb, lambda result, error: told.append(result), **arguments)
    for _ in range(3):
        bench.engine.add_request(OTHER, greedy(1))
        assert bench.bench.step()[0].final is not None and not told and not bench.state.is_settled()
    bench.lane.is_open = True
    for _ in range(4):
        bench.lane.run()
        bench.bench.step()
    (result,) = told
    if verb == "export":
        assert bench.store.explain(state_id).receipts[-1].reason == "its text and 4 of 4 blocks"
    else:
        assert result.ok and ("4 of 4 blocks held" in result.reason or verb == "verify")


@pytest.mark.parametrize("ending", ["unpin", "drop"])
def test_a_pin_that_is_given_back_while_it_loads_holds_nothing(ending: str) -> None:
    bench = warm()
    state_id = bench.store.put(PROMPT[:16])
    told: list[Any] = []
    bench.lane.is_open = False
    bench.store.later("pin", lambda result, error: told.append(result), state_id=state_id)
    assert getattr(bench.store, ending)(state_id).ok
    bench.lane.run()
    bench.store.poll()
    (receipt,) = told
    assert not receipt.ok and "given back" in receipt.reason and not bench.manager.leases
    check_blocks(bench.manager, [])


def test_pins_beyond_their_share_are_refused_with_a_receipt() -> None:
    bench = warm()
    receipt = bench.store.pin(bench.store.put([*PROMPT, *PROMPT[:10]]))
    assert not receipt.ok and "more than" in receipt.reason and not bench.manager.leases


def test_the_device_evicts_what_nobody_holds_and_a_drop_takes_it_too() -> None:
    bench = StateBench()
    bench.run(PROMPT, greedy(1))
    before = bench.state.num_cached_blocks
    receipt = bench.store.evict(tier="device", bytes=2 * bench.state.device.block_bytes)
    assert receipt.ok and bench.state.num_cached_blocks == before - 2
    check_blocks(bench.manager, [])
    state_id = bench.store.put(PROMPT[:16])
    assert bench.store.drop(state_id).ok
    assert not any(map(bench.state.device.holds, bench.store.plane.chain_of(PROMPT[:16], "default")))
    assert bench.run(PROMPT, greedy(2)).token_ids == answer(PROMPT, 2, VOCAB)


def test_a_session_owns_its_requests_blocks_until_it_is_dropped() -> None:
    bench = StateBench(kv_tiers=("host", "cellar"))
    for salt in ("", "salt"):
        bench.engine.add_request(PROMPT, greedy(3), session_id="talk", namespace="tenant", cache_salt=salt)
        bench.bench.drain()
    bench.write_all()
    facts = bench.store.explain("talk", "tenant").facts
    assert facts["blocks"] == 16 and facts["blocks_in"] == {"device": 16, "host": 16, "cellar": 16}
    assert set(bench.store.plane.places["cellar"].by_kind) == {"session"}
    assert bench.store.drop("talk", "tenant").ok
    assert not bench.manager.hash_to_block_id and not bench.store.plane.catalog.entries
    bench.engine.add_request(PROMPT, greedy(1))
    bench.bench.drain()
    assert not bench.store.ls()
