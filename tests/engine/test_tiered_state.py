"""State beneath the engine: every load is exact or computed, nobody waits for it, nothing is released twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanovllm.core.events import MoveEvent
from nanovllm.engine.integrity import check_blocks
from nanovllm.engine.sequence import SequenceStatus
from nanovllm.errors import StateNotFoundError
from nanovllm.state.counters import LOADS
from nanovllm.state.objects import Session
from nanovllm.state.receipts import Receipt
from tests.engine.helpers import answer, greedy
from tests.engine.state_bench import SIZE, StateBench

VOCAB = 251
PROMPT = [(7 * i + i * i) % VOCAB for i in range(30)]
OTHER = [200, 3, 5]


def warm(num_tokens: int = len(PROMPT), **knobs: Any) -> StateBench:
    """An engine whose device has forgotten the first `num_tokens` of PROMPT, and whose cellar has them."""
    bench = StateBench(**knobs)
    bench.run(PROMPT[:num_tokens], greedy(1))
    bench.write_all()
    bench.forget_device()
    return bench


def loads(bench: StateBench) -> list[Receipt]:
    return [receipt for receipt in bench.store.plane.history.recent if receipt.action == "load"]


def status_of(bench: StateBench, request_id: str) -> SequenceStatus:
    return bench.engine.book.sequences(request_id)[0].status


# -- what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hit", [0, 3, 4, 5, 8, 15, 16, 28, 30])
@pytest.mark.parametrize("tier", ["host", "cellar"])
def test_every_hit_length_from_every_tier_is_exact(hit: int, tier: str) -> None:
    bench = warm(hit, kv_tiers=(tier,)) if hit else StateBench(kv_tiers=(tier,))
    final = bench.run(PROMPT, greedy(6))
    whole = min(hit // SIZE, (len(PROMPT) - 1) // SIZE) * SIZE
    assert final.token_ids == answer(PROMPT, 6, VOCAB)
    assert final.cached_tokens == whole and final.hit_tokens_by_tier == ({tier: whole} if whole else {})
    assert bench.bench.runner.num_computed == hit + len(PROMPT) - whole + 5
    again = bench.run(PROMPT, greedy(6))
    assert again.hit_tokens_by_tier == {"device": 28} and again.token_ids == final.token_ids


def test_a_prefix_that_lies_in_three_places_is_told_by_tier() -> None:
    bench = warm(kv_tiers=("host", "cellar"))
    bench.run(PROMPT[:9], greedy(1))
    bench.write_all()
    chain = bench.store.plane.chain_of(PROMPT, "default")
    for digest in reversed(chain[4:]):
        entry = bench.store.plane.catalog.entries[digest]
        bench.store.plane.evict(bench.store.plane.places["host"], entry)
    final = bench.run(PROMPT, greedy(3))
    assert final.hit_tokens_by_tier == {"device": 8, "host": 8, "cellar": 12}
    assert final.cached_tokens == sum(final.hit_tokens_by_tier.values())


def test_what_was_evicted_before_it_was_written_is_written_then() -> None:
    bench = StateBench(num_blocks=10)
    bench.state.behind.write = lambda: None  # type: ignore[method-assign]  # the queue stands still
    bench.state.behind._eviction_budget = 1 << 20
    bench.run(PROMPT, greedy(1))
    bench.run(PROMPT[::-1], greedy(1))
    assert bench.run(PROMPT, greedy(4)).hit_tokens_by_tier.get("cellar", 0) > 0


def test_a_preempted_sequence_finds_its_own_blocks_below() -> None:
    bench = StateBench()
    bench.engine.add_request(PROMPT, greedy(12), request_id="r")
    for _ in range(7):
        bench.bench.step()
    (seq,) = bench.engine.scheduler.running
    bench.engine.scheduler.preempt(seq)
    bench.forget_device()
    final = bench.bench.drain()["r"]
    assert final.token_ids == answer(PROMPT, 12, VOCAB) and bench.state.counters.loaded_tokens == 32
    assert final.cached_tokens == 0 and final.hit_tokens_by_tier == {}  # its own work is no hit


def test_matching_asks_the_catalog_and_changes_nothing() -> None:
    bench = warm()
    reads = bench.store.plane.places["cellar"].counters.reads
    bench.engine.add_request(PROMPT, greedy(1), request_id="probe")
    (seq,) = bench.engine.scheduler.waiting
    before = (list(bench.manager.free_block_ids), dict(bench.manager.hash_to_block_id))
    match = bench.state.match(seq)
    assert (match.num_hit_tokens, match.num_potential_tokens) == (0, 28)
    assert (list(bench.manager.free_block_ids), dict(bench.manager.hash_to_block_id)) == before
    assert bench.store.plane.places["cellar"].counters.reads == reads and not seq.block_table
    bench.bench.drain()


def test_observing_moves_nothing() -> None:
    bench = StateBench(prefix_mode="observe", kv_tiers=("host", "cellar"))
    for _ in range(2):
        final = bench.run(PROMPT, greedy(2))
        assert (final.cached_tokens, final.token_ids) == (0, answer(PROMPT, 2, VOCAB))
    assert not bench.store.plane.catalog.entries and bench.state.is_settled()


def test_another_tenants_blocks_and_another_salt_are_a_miss() -> None:
    bench = warm()
    for labels in ({"namespace": "somebody"}, {"cache_salt": "salt"}):
        request_id = bench.engine.add_request(PROMPT, greedy(2), **labels)
        final = bench.bench.drain()[request_id]
        assert (final.cached_tokens, final.token_ids) == (0, answer(PROMPT, 2, VOCAB))


# -- while it loads ------------------------------------------------------------------------------------


def test_a_load_holds_nobody_up_and_its_time_is_told() -> None:
    bench = warm()
    bench.lane.is_open = False
    bench.engine.add_request(PROMPT, greedy(3), request_id="slow")
    bench.engine.add_request(OTHER, greedy(3), request_id="other")
    for _ in range(3):
        outputs = bench.bench.step()
        assert [out.request_id for out in outputs] == ["other"]
        assert status_of(bench, "slow") is SequenceStatus.WAITING_FOR_STATE
        bench.clock.advance(2_000_000)
    bench.lane.is_open = True
    bench.lane.run()
    final = bench.bench.drain()["slow"]
    assert final.token_ids == answer(PROMPT, 3, VOCAB) and final.hit_tokens_by_tier == {"cellar": 28}
    assert final.timeline.state_wait_ns == 6_000_000 <= final.timeline.t_queue_ns


@pytest.mark.parametrize(("load_mode", "waits_ms"), [("auto", 30), ("always", 50)])
def test_asking_a_shared_tier_may_not_cost_much_of_what_it_could_save(load_mode: str, waits_ms: int) -> None:
    """A quarter of the 120 ms that computing takes, where it may decide; else the tier's deadline."""
    bench = StateBench(load_mode=load_mode)
    bench.cellar.shared, bench.lane.is_open = True, False  # type: ignore[misc]
    bench.state.costs.observe(30, 120.0)
    bench.engine.add_request(PROMPT, greedy(3), request_id="slow")
    waited_ms = 0
    bench.bench.step()
    while status_of(bench, "slow") is SequenceStatus.WAITING_FOR_STATE:
        bench.clock.advance(10_000_000)
        waited_ms += 10
        bench.bench.step()
    assert waited_ms == waits_ms
    bench.lane.is_open = True
    bench.lane.run()
    final = bench.bench.drain()["slow"]
    assert final.token_ids == answer(PROMPT, 3, VOCAB) and final.cached_tokens == 0


def test_a_shared_tier_that_answers_and_fails_every_read_is_left_alone() -> None:
    """Lookups that succeed in between do not make up for reads that fail."""
    bench = warm()
    bench.cellar.shared, reads = True, bench.store.plane.places["cellar"].reads  # type: ignore[misc]
    bench.cellar.is_failing = True
    for i in range(5):
        assert reads.state == "closed"
        assert bench.run(PROMPT, greedy(3)).token_ids == answer(PROMPT, 3, VOCAB)
        bench.run([i, *OTHER * 3], greedy(1))
        bench.forget_device()
    assert reads.state == "open"


def test_a_step_copies_no_more_than_its_share() -> None:
    bench = warm()
    bench.engine.add_request(PROMPT, greedy(1), request_id="slow")
    seen = []
    while bench.engine.is_live("slow"):
        (load,) = list(bench.state._loads.values()) or [None]
        seen.append(load.num_done if load else None)
        bench.bench.step()
    assert [n for n in seen if n is not None] == [0, 4]  # 4 blocks a step, 7 in all


def test_aborted_while_loading_it_gives_its_blocks_back_once_and_late_bytes_go_nowhere() -> None:
    bench = warm()
    bench.lane.is_open = False
    bench.engine.add_request(PROMPT, greedy(3), request_id="slow")
    bench.bench.step()
    bench.bench.step()
    assert bench.engine.abort("slow") and bench.state.counters.loads_cancelled == 1
    check_blocks(bench.manager, bench.engine.scheduler.live())
    assert not bench.manager.used_block_ids
    bench.engine.add_request(PROMPT[::-1], greedy(8), request_id="next")  # takes the very blocks
    bench.bench.step()
    bench.lane.is_open = True
    bench.lane.run()
    assert bench.bench.drain()["next"].token_ids == answer(PROMPT[::-1], 8, VOCAB)
    assert bench.bench.terminals("slow") == ["aborted"] and bench.state.is_settled()


def test_who_shares_the_prefix_waits_for_the_load() -> None:
    bench = warm()
    bench.lane.is_open = False
    bench.engine.add_request(PROMPT, greedy(3), request_id="slow")
    bench.engine.add_request([*PROMPT, 1], greedy(3), request_id="follower")
    bench.bench.step()
    bench.bench.step()
    assert status_of(bench, "follower") is SequenceStatus.WAITING
    bench.lane.is_open = True
    bench.lane.run()
    finals = bench.bench.drain()
    assert finals["follower"].token_ids == answer([*PROMPT, 1], 3, VOCAB)
    assert finals["follower"].hit_tokens_by_tier == {"device": 28} and bench.state.counters.loads == 1


# -- what goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["failing", "flipped", "hanging", "gone", "short", "raising"])
def test_whatever_fails_is_computed_and_counted(fault: str) -> None:
    bench = warm()
    if fault == "failing":
        bench.cellar.is_failing = True
    elif fault == "flipped":
        bench.cellar.flip = 4001
    elif fault == "hanging":
        bench.lane.is_open = False
    elif fault == "gone":
        bench.cellar.drop(list(bench.cellar._sealed))
    elif fault == "raising":
        bench.store.load = lambda blocks: 1 // 0  # type: ignore[method-assign]
    elif fault == "short":
        bench.cellar.drop([bench.store.plane.chain_of(PROMPT, "default")[2]])
    bench.engine.add_request(PROMPT, greedy(4), request_id="r")
    for _ in range(4):
        bench.bench.step()
        bench.clock.advance(20_000_000)
    final = bench.bench.drain()["r"]
    came = 8 if fault == "short" else 0
    assert final.error is None and final.token_ids == answer(PROMPT, 4, VOCAB)
    assert final.cached_tokens == came and bench.state.counters.loads_failed == 1
    (receipt,) = loads(bench)
    assert not receipt.ok and "did not come" in receipt.reason and receipt.detail["loaded_tokens"] == came
    assert (bench.state.counters.errors > 0) == (fault == "raising")


def test_a_tier_that_takes_nothing_stops_the_writing_and_never_the_serving() -> None:
    bench = StateBench(kv_tiers=("cellar",))
    bench.cellar.is_failing = True
    for i in range(6):
        assert bench.run([i, *PROMPT], greedy(2)).token_ids == answer([i, *PROMPT], 2, VOCAB)
    bench.write_all()
    assert bench.state.facts()["spills_waiting"] == 0 and bench.store.plane.places["cellar"].counters.failures > 0


# -- what it costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute_ms", "loads_it"), [(0.0001, False), (50.0, True)])
def test_a_load_starts_only_where_it_is_cheaper_and_the_receipt_has_both_estimates(
    compute_ms: float, loads_it: bool
) -> None:
    bench = warm(load_mode="auto")
    bench.state.costs.observe(100, 100 * compute_ms)
    final = bench.run(PROMPT, greedy(2))
    assert final.cached_tokens == (28 if loads_it else 0) and final.token_ids == answer(PROMPT, 2, VOCAB)
    (receipt,) = loads(bench)
    assert receipt.ok is loads_it and receipt.detail["decision"].startswith("loading" if loads_it else "computing")
    assert receipt.detail["estimated_compute_ms"] == pytest.approx(28 * compute_ms)
    assert receipt.detail["estimated_load_ms"] > 0
    assert bench.state.counters.loads_refused == (not loads_it)
    assert [event.outcome for event in moves(bench, "load")] == ["done" if loads_it else "refused"]
    assert wanted(bench, "kv") == ([7, 0, 0] if loads_it else [0, 0, 7])


@pytest.mark.parametrize(("cellar_bytes_per_ms", "tiers"), [(1.0, {"host": 12}), (1e6, {"host": 12, "cellar": 16})])
def test_what_lies_in_a_slow_tier_is_computed_behind_what_lies_in_a_fast_one(
    cellar_bytes_per_ms: float, tiers: dict[str, int]
) -> None:
    bench = warm(kv_tiers=("host", "cellar"), load_mode="auto")
    plane = bench.store.plane
    for digest in reversed(plane.chain_of(PROMPT, "default")[3:]):
        plane.evict(plane.places["host"], plane.catalog.entries[digest])
    plane.flush(plane.places["host"])
    plane.places["host"].read_speed.recall(1e6)
    plane.places["cellar"].read_speed.recall(cellar_bytes_per_ms)
    bench.state.costs.observe(100, 100.0)
    final = bench.run(PROMPT, greedy(2))
    assert final.hit_tokens_by_tier == tiers and final.token_ids == answer(PROMPT, 2, VOCAB)


def moves(bench: StateBench, move: str) -> list[MoveEvent]:
    events = bench.engine.events.reader(from_start=True).poll()
    return [event for event in events if isinstance(event, MoveEvent) and event.move == move]


def wanted(bench: StateBench, kind: str) -> list[int]:
    """Blocks of that kind that came from the cellar, did not come, or were refused."""
    counters = bench.store.plane.places["cellar"].tally.kinds[kind]
    return [getattr(counters, outcome) for outcome in LOADS]


def test_what_moved_is_told_as_events() -> None:
    bench = warm()
    size = bench.state.device.block_bytes
    assert {(event.tier, event.outcome) for event in moves(bench, "write")} == {("cellar", "done")}
    assert sum(event.blocks for event in moves(bench, "write")) == bench.state.facts()["spilled_blocks"] == 7
    request_id = bench.engine.add_request(PROMPT, greedy(1))
    bench.bench.drain()
    (load,) = moves(bench, "load")
    assert load[3:7] == ("cellar", request_id, 7, 7 * size) and load.outcome == "done" and load.kinds == "kv"
    assert {event.kinds for event in moves(bench, "write")} == {"kv"} and wanted(bench, "kv") == [7, 0, 0]
    bench.store.put(Session([{"role": "user", "content": "hi"}], PROMPT[:8]))  # what a session owns is a session's
    bench.forget_device()
    bench.cellar.drop([bench.store.plane.chain_of(PROMPT, "default")[2]])
    bench.run(PROMPT, greedy(1))
    assert (moves(bench, "load")[1].blocks, moves(bench, "load")[1].outcome) == (2, "partial")
    assert moves(bench, "load")[1].kinds == "kv+session"
    assert (wanted(bench, "kv"), wanted(bench, "session")) == ([7, 5, 0], [2, 0, 0])
    assert not moves(bench, "failure")


def test_a_tier_that_fails_is_told_once_a_step_and_how_it_is_left() -> None:
    bench = StateBench(load_mode="auto")
    bench.cellar.is_failing = True
    for i in range(6):
        bench.run([i, *PROMPT], greedy(1))
        bench.write_all()
    told = [event.outcome for event in moves(bench, "failure")]
    assert (
        told[0] == "closed" and told[-1] == "open" and len(told) <= bench.store.plane.places["cellar"].counters.failures
    )
    assert {event.outcome for event in moves(bench, "write")} == {"failed"}
    assert {event.kinds for event in moves(bench, "failure")} == {"kv"}


# -- all of it at once ---------------------------------------------------------------------------------


SESSIONS = st.sampled_from(["", "one", "two"])


class TieredMachine(RuleBasedStateMachine):
    """Requests, aborts, pins, evictions and faults in any order: every text is the cold one, the books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.b = StateBench(kv_tiers=("host", "cellar"), num_blocks=14, max_num_batched_tokens=16)
        self.live: dict[str, list[int]] = {}
        self.pins: list[str] = []
        self.count = self.asked = 0

    @rule(start=st.integers(0, 1), length=st.integers(1, 30), tokens=st.integers(1, 9), session=SESSIONS)
    def request(self, start: int, length: int, tokens: int, session: str) -> None:
        self.count += 1
        prompt = PROMPT[start : start + length]
        labels = {"request_id": f"r{self.count}", "session_id": session}
        self.live[self.b.engine.add_request(prompt, greedy(tokens), **labels)] = prompt

    @precondition(lambda self: self.b.lane.is_open and not self.b.lane._jobs)
    @rule(session=SESSIONS)
    def drop_session(self, session: str) -> None:
        for obj in self.b.store.ls(kind="session"):
            if obj.name == session:
                assert self.b.store.drop(obj.state_id).ok

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for out in self.b.bench.step():
                if out.final is not None and out.finish_reason != "abort":
                    prompt = self.live.pop(out.request_id)
                    assert out.final.error is None
                    assert out.final.token_ids == answer(prompt, len(out.final.token_ids), VOCAB)
                    assert sum(out.final.hit_tokens_by_tier.values()) == out.final.cached_tokens
            self.b.clock.advance(1_000_000)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.b.engine.abort(request_id)
        del self.live[request_id]

    @rule(is_failing=st.booleans(), flip=st.one_of(st.none(), st.integers(0, 10**4)), is_open=st.booleans())
    def weather(self, is_failing: bool, flip: int | None, is_open: bool) -> None:
        self.b.cellar.is_failing, self.b.cellar.flip, self.b.lane.is_open = is_failing, flip, is_open
        if is_open:
            self.b.lane.run()

    @rule(tier=st.sampled_from(["device", "host", "cellar"]), size=st.integers(1, 2000))
    def evict(self, tier: str, size: int) -> None:
        self.b.store.evict(tier=tier, bytes=size)

    @precondition(lambda self: len(self.pins) < 3)
    @rule(length=st.integers(4, 9), device=st.sampled_from(["gpu", "gpu", "host", "cellar"]))
    def pin(self, length: int, device: str) -> None:
        self.pins.append(self.b.store.put(PROMPT[:length]))
        self.ask("pin", state_id=self.pins[-1], device=device, ttl=1.0)

    @precondition(lambda self: self.pins)
    @rule(verb=st.sampled_from(["get", "export", "pin", "fork", "verify"]))
    def read(self, verb: str) -> None:
        self.ask(verb, **({} if verb == "verify" else {"state_id": self.pins[0]}))

    def ask(self, verb: str, **arguments: Any) -> None:
        self.asked += 1
        self.b.store.later(verb, self.told, **arguments)

    def told(self, result: Any, error: Exception | None) -> None:
        self.asked -= 1
        assert error is None or isinstance(error, StateNotFoundError), error

    @precondition(lambda self: self.pins)
    @rule(drops=st.booleans())
    def let_go(self, drops: bool) -> None:
        state_id = self.pins.pop()
        if drops:
            self.b.store.drop(state_id)
        else:
            self.b.store.unpin(state_id)

    @rule()
    def forget_device(self) -> None:
        for digest in list(self.b.manager.hash_to_block_id):
            self.b.state.device.discard(digest)

    @invariant()
    def books_balance(self) -> None:
        check_blocks(self.b.manager, self.b.engine.scheduler.live())
        assert self.b.state.counters.errors == 0

    def teardown(self) -> None:
        self.b.lane.is_open = True
        self.b.lane.run()
        for state_id in self.pins:
            self.b.store.unpin(state_id)
        for _ in range(400):
            if not self.live and not self.asked:
                break
            self.step(1)
        assert not self.live and self.asked == 0
        for obj in self.b.store.ls():
            self.b.store.drop(obj.state_id)
        assert not self.b.manager.leases and not self.b.store._residency.pins


TestTieredMachine = TieredMachine.TestCase
TestTieredMachine.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
