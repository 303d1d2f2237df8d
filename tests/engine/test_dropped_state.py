"""What is dropped while it waits to be written, or is being written; whose sessions are whose where KV is shared."""

from __future__ import annotations

from typing import Any

from tests.engine.helpers import greedy
from tests.engine.state_bench import HandLane, StateBench

VOCAB = 251
PROMPT = [(7 * i + i * i) % VOCAB for i in range(30)]


def test_what_is_dropped_while_it_waits_to_be_written_is_not_written_any_more() -> None:
    """A sequence runs on the blocks, so that they cannot be discarded at once, and nothing is written at all yet."""
    bench = StateBench(num_blocks=16, kv_tiers=("host", "cellar"))
    write, bench.state.behind.write = bench.state.behind.write, lambda: None  # type: ignore[method-assign]
    state_id = bench.store.put(PROMPT)
    bench.engine.add_request(PROMPT, greedy(9), request_id="runs")
    for _ in range(3):
        bench.bench.step()
    chain = bench.store.find(state_id).chain
    assert len(chain) == 7 and all(bench.state.device.holds(digest) for digest in chain)
    receipt = bench.store.drop(state_id)
    assert receipt.ok and "go when the sequences" in receipt.reason
    bench.state.behind.write = write  # type: ignore[method-assign]
    assert len(bench.bench.drain()["runs"].token_ids) == 9
    for i in range(4):  # others want the room: the last moment to copy what is overwritten
        bench.run([(i + 2) * k % VOCAB for k in range(30)], greedy(1))
    bench.write_all()
    places = bench.store.plane.places.values()
    assert not any(any(place.tier.contains(list(chain))) for place in places)
    assert not any(bench.state.device.holds(digest) for digest in chain)
    assert bench.run(PROMPT, greedy(9)).cached_tokens == 0


def test_what_is_dropped_while_it_is_being_written_is_removed_again() -> None:
    bench = StateBench()
    lane = HandLane(bench.clock)
    lane.is_open = False
    bench.store.plane.places["cellar"].write_lane = lane
    state_id = bench.store.put(PROMPT)
    bench.run(PROMPT, greedy(1))
    while not bench.store.plane.catalog.entries.keys() & set(chain := bench.store.find(state_id).chain):
        bench.bench.step()
    gone: list[Any] = []
    bench.store.later("drop", lambda receipt, error: gone.append(receipt), state_id=state_id)
    assert not gone and bench.store.match(PROMPT).num_tokens == 0
    for _ in range(20):
        lane.run()
        bench.bench.step()
    assert gone[0].ok and bench.state.is_settled()
    assert not any(bench.cellar.contains(list(chain)))


def test_a_session_is_whose_it_is_though_its_blocks_lie_with_all() -> None:
    """Two keys share their KV and call their sessions alike: two records, and each is dropped by itself."""
    bench = StateBench(kv_tiers=("host",))
    for owner, prompt in (("alice", PROMPT), ("bob", PROMPT[:16] + [200, 3, 5] * 4)):
        bench.engine.add_request(prompt, greedy(1), session_id="talk", session_owner=owner, request_id=owner)
        bench.bench.drain()
    bench.write_all()
    alice, bob = bench.store.find("talk", "alice"), bench.store.find("talk", "bob")
    assert alice.state_id != bob.state_id and set(alice.chain) & set(bob.chain) and not bench.store.ls("default")
    assert bench.store.drop("talk", "alice").ok and bench.store.find("talk", "bob").chain == bob.chain
    assert bench.store.match(PROMPT).num_tokens == 16, "what bob's session owns, too"
