"""The ledger: what is counted is given back, what does not fit is refused, whatever the order of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from nanovllm.errors import BusyError, InvalidRequestError, RateLimitError
from nanovllm.serve.admission import Admission, Slot
from nanovllm.serve.body import estimated_tokens
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.context import Tenant

ANY, ALICE, BOB = Tenant("", ""), Tenant("alice", "a"), Tenant("bob", "b")
Step = Callable[[], Any]


def ledger(speed: float = 0.0, **settings: Any) -> Admission:
    return Admission(ServerConfig(**settings), lambda: speed)


def books(admission: Admission) -> tuple[int, int, int, dict[str, int]]:
    queue = admission.queued_requests, admission.queued_tokens
    return *queue, admission.in_flight, dict(admission.in_flight_of)


def test_a_slot_through_its_life() -> None:
    admission = ledger()
    slot = admission.admit(ALICE, 100)
    assert books(admission) == (1, 100, 1, {"alice": 1})
    slot.revise(40, 3)
    assert books(admission) == (3, 40, 3, {"alice": 3})
    slot.started()
    assert books(admission) == (0, 0, 3, {"alice": 3})
    slot.release()
    slot.release()
    slot.started()
    slot.revise(7, 7)
    assert books(admission) == (0, 0, 0, {})


def test_a_full_queue_refuses_until_one_has_started() -> None:
    admission = ledger(max_queued_requests=2)
    first, _ = admission.admit(ANY, 1), admission.admit(ANY, 1)
    with pytest.raises(BusyError) as refused:
        admission.admit(ANY, 1)
    assert (refused.value.status, refused.value.code) == (503, "server_overloaded")
    assert admission.rejected == {"server_overloaded": 1}
    first.started()
    admission.admit(ANY, 1)


def test_queued_tokens_are_bounded_by_what_is_prefilled_in_time() -> None:
    admission = ledger(speed=10.0, ttft_slo=30.0)
    assert admission.max_queued_tokens == 300
    first = admission.admit(ANY, 10_000)  # alone, whatever its length
    with pytest.raises(BusyError):
        admission.admit(ANY, 1)
    first.revise(299, 1)
    admission.admit(ANY, 1)
    with pytest.raises(BusyError):
        admission.admit(ANY, 1)


def test_queued_tokens_as_set_and_before_anything_is_measured() -> None:
    assert ledger(speed=10.0, max_queued_tokens=7).max_queued_tokens == 7
    admission = ledger()
    for _ in range(10):
        admission.admit(ANY, 10**9)
    assert admission.queued_tokens == 10**10


@pytest.mark.parametrize(("speed", "tokens", "seconds"), [(0, 10, 1), (10, 0, 1), (10, 54, 5), (10, 10**6, 30)])
def test_retry_after(speed: float, tokens: int, seconds: int) -> None:
    admission = ledger(speed=speed)
    admission.admit(ANY, tokens)
    assert admission.retry_after_s() == seconds


def test_a_tenants_share() -> None:
    admission = ledger(max_tenant_requests=2)
    first, second = admission.admit(ALICE, 1), admission.admit(ALICE, 1)
    first.started()
    with pytest.raises(RateLimitError) as refused:
        admission.admit(ALICE, 1)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
    admission.admit(BOB, 1)
    second.release()
    third = admission.admit(ALICE, 1)
    with pytest.raises(RateLimitError):
        third.revise(1, 2)
    assert admission.in_flight_of["alice"] == 2
    for _ in range(9):
        admission.admit(ANY, 1)  # without keys there are no shares


def test_what_turns_out_too_large_is_refused_and_stays_whole() -> None:
    admission = ledger(max_queued_tokens=100, max_queued_requests=4)
    slot, other = admission.admit(ANY, 10), admission.admit(ANY, 50)
    for tokens, count in ((51, 1), (10, 4)):
        with pytest.raises(BusyError):
            slot.revise(tokens, count)
        assert books(admission) == (2, 60, 2, {"": 2})
    other.release()
    slot.revise(10_000, 16)  # alone it fits
    assert books(admission) == (16, 10_000, 16, {"": 16})


def test_what_its_tenant_may_never_have_is_no_matter_of_waiting() -> None:
    admission = ledger(max_tenant_requests=4)
    slot = admission.admit(ALICE, 1)
    with pytest.raises(InvalidRequestError, match="5 answers"):
        slot.revise(1, 5)
    slot.revise(1, 4)
    assert books(admission) == (4, 1, 4, {"alice": 4})


@given(st.integers(0, 2**40), st.integers(1, 10**6))
def test_estimates(length: int, most: int) -> None:
    assert estimated_tokens({b"content-length": b"%d" % length}, most) == min(length // 3, most)
    assert estimated_tokens({}, most) == most


class Ledger(RuleBasedStateMachine):
    """Any order of admissions, revisions, starts and releases, against the sums over the slots held."""

    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.admission = ledger(speed=10.0, max_queued_requests=6, max_tenant_requests=5, ttft_slo=20.0)
        self.held: list[Slot] = []

    @rule(target=slots, tenant=st.sampled_from([ANY, ALICE, BOB]), tokens=st.integers(0, 150))
    def admit(self, tenant: Tenant, tokens: int) -> Any:
        before = books(self.admission)
        try:
            slot = self.admission.admit(tenant, tokens)
        except BusyError as error:
            assert 1 <= error.retry_after_s <= 30
            assert books(self.admission) == before
            assert before[0] or isinstance(error, RateLimitError)  # an empty queue takes any one request
            return multiple()
        self.held.append(slot)
        return slot

    @rule(slot=slots, tokens=st.integers(0, 400), count=st.integers(1, 8))
    def revise(self, slot: Slot, tokens: int, count: int) -> None:
        before = books(self.admission)
        try:
            slot.revise(tokens, count)
        except (BusyError, InvalidRequestError) as error:
            assert books(self.admission) == before
            assert isinstance(error, BusyError) or count > 5

    @rule(slot=slots)
    def start(self, slot: Slot) -> None:
        slot.started()

    @rule(slot=consumes(slots), times=st.integers(1, 3))
    def release(self, slot: Slot, times: int) -> None:
        for _ in range(times):
            slot.release()
        self.held.remove(slot)

    @rule(slot=slots)
    def release_and_go_on_using(self, slot: Slot) -> None:
        slot.release()

    @invariant()
    def sums_are_those_of_the_slots(self) -> None:
        held = [slot for slot in self.held if slot.is_held]
        queued = [slot for slot in held if slot.is_queued]
        of_tenant = {name: sum(s.count for s in held if s.tenant.name == name) for name in ("", "alice", "bob")}
        assert books(self.admission) == (
            sum(slot.count for slot in queued),
            sum(slot.tokens for slot in queued),
            sum(slot.count for slot in held),
            {name: count for name, count in of_tenant.items() if count},
        )
        assert min(books(self.admission)[:3]) >= 0

    def teardown(self) -> None:
        for slot in self.held:
            slot.release()
        assert books(self.admission) == (0, 0, 0, {})


TestLedger = Ledger.TestCase
