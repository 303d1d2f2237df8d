"""BlockManager as a state machine, against a model that knows whose KV every slot really holds."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from nanovllm.core.digest import block_digest
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.eviction import FreeBlocks, LRUEviction
from nanovllm.engine.integrity import check_blocks
from nanovllm.engine.sequence import Sequence, SequenceStatus
from tests.engine.helpers import stub_digest

PARAMS = SamplingParams()
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class BlockManagerMachine(RuleBasedStateMachine):
    live = Bundle("live")
    leases = Bundle("leases")

    @initialize(
        num_blocks=st.integers(1, 10),
        block_size=st.integers(1, 4),
        mode=st.sampled_from(["reuse", "reuse", "observe", "off"]),
        bits=st.sampled_from([None, 1, 2, 2, 3, 3, 8]),
    )
    def start(self, num_blocks: int, block_size: int, mode: str, bits: int | None) -> None:
        digest_fn = block_digest if bits is None else stub_digest(bits)
        self.manager = BlockManager(num_blocks, block_size, mode, digest_fn=digest_fn)
        self.kv: list[list[tuple[int, ...] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.seqs: list[Sequence] = []
        self.held: list[int] = []

    # -- the model -----------------------------------------------------------------------------

    def slot(self, seq: Sequence, position: int) -> tuple[int, int]:
        size = self.manager.block_size
        return seq.block_table[position // size], position % size

    def holds_prefix(self, seq: Sequence, num_tokens: int) -> bool:
        slots = (self.slot(seq, p) for p in range(num_tokens))
        return all(self.kv[b][o] == tuple(seq.token_ids[: p + 1]) for p, (b, o) in enumerate(slots))

    # -- rules -----------------------------------------------------------------------------------

    @rule(target=live, token_ids=TOKENS, headroom=st.integers(0, 2))
    def admit(self, token_ids: list[int], headroom: int) -> Sequence:
        seq = Sequence(token_ids, PARAMS, self.manager.block_size)
        self.enter(seq, headroom)
        return seq

    def enter(self, seq: Sequence, headroom: int = 0) -> None:
        manager = self.manager
        free, cached = len(manager.free_block_ids), manager.free_block_ids.num_cached
        hits = manager.hits(seq)
        room = manager.can_allocate(seq, headroom)
        assert (len(manager.free_block_ids), manager.free_block_ids.num_cached) == (free, cached)
        in_use = sum(block.ref_count > 0 for block in hits)
        assert room == (seq.num_blocks - in_use + headroom <= free)
        if not room:
            return
        manager.allocate(seq)
        seq.move_to(SequenceStatus.RUNNING)
        self.seqs.append(seq)
        assert len(manager.free_block_ids) == free - (seq.num_blocks - in_use)
        assert seq.block_table[: len(hits)] == [block.block_id for block in hits]
        assert seq.num_cached_tokens == len(hits) * manager.block_size < seq.num_tokens
        assert manager.prefix_mode == "reuse" or not hits

    @rule(seq=live, share=st.floats(0.01, 1.0))
    def compute(self, seq: Sequence, share: float) -> None:
        self.fill(seq, share)

    def fill(self, seq: Sequence, share: float) -> None:
        """A chunk of the known tokens gets its KV."""
        if seq not in self.seqs or seq.num_remaining_tokens == 0:
            return
        start = seq.num_cached_tokens
        end = start + max(1, int(share * seq.num_remaining_tokens))
        for position in range(start, end):
            block_id, offset = self.slot(seq, position)
            assert self.manager.blocks[block_id].hash_value is None, "a published block is written"
            self.kv[block_id][offset] = tuple(seq.token_ids[: position + 1])
        self.manager.hash_blocks(seq, end)
        seq.num_cached_tokens = end

    @rule(token_ids=TOKENS)
    def serve(self, token_ids: list[int]) -> None:
        """A whole short life: enter, compute, leave."""
        seq = Sequence(token_ids, PARAMS, self.manager.block_size)
        self.enter(seq)
        self.fill(seq, 1.0)
        self.leave(seq)

    @rule(seq=live, token_id=st.integers(0, 1))
    def grow(self, seq: Sequence, token_id: int) -> None:
        if seq not in self.seqs or seq.num_remaining_tokens > 0:
            return
        seq.append_token(token_id)
        if self.manager.can_append(seq):
            self.manager.may_append(seq)
        else:
            self.leave(seq)

    def leave(self, seq: Sequence) -> None:
        """Finish, abort and preemption look the same from here."""
        if seq in self.seqs:
            self.seqs.remove(seq)
            seq.move_to(SequenceStatus.WAITING)
        self.manager.deallocate(seq)
        assert not seq.block_table and seq.num_cached_tokens == 0

    @rule(seq=consumes(live))
    def finish(self, seq: Sequence) -> None:
        self.leave(seq)

    @rule(seq=live)
    def preempt_or_return(self, seq: Sequence) -> None:
        if seq in self.seqs:
            self.leave(seq)
        else:
            self.enter(seq)

    @rule(target=leases, seq=live, first=st.integers(0, 5))
    def acquire(self, seq: Sequence, first: int) -> object:
        return self.manager.acquire(seq.block_table[first : first + 3], "test")

    @rule(target=leases, block_id=st.integers(0, 9))
    def pin_any(self, block_id: int) -> object:
        return self.manager.acquire([block_id] if block_id < self.manager.num_blocks else [], "pin")

    @rule(lease=leases)
    def release(self, lease: object) -> None:
        self.manager.release(lease)  # type: ignore[arg-type]  # twice does nothing

    # -- what must hold --------------------------------------------------------------------------

    @precondition(lambda self: hasattr(self, "manager"))
    @invariant()
    def books_balance(self) -> None:
        check_blocks(self.manager, self.seqs)

    @precondition(lambda self: hasattr(self, "manager"))
    @invariant()
    def every_valid_slot_holds_its_own_prefix(self) -> None:
        for seq in self.seqs:
            assert self.holds_prefix(seq, seq.num_cached_tokens)

    @precondition(lambda self: hasattr(self, "manager"))
    @invariant()
    def every_findable_block_is_full_of_its_tokens(self) -> None:
        for block_id in self.manager.hash_to_block_id.values():
            block = self.manager.blocks[block_id]
            last = self.kv[block_id][-1]
            assert last is not None and last[-self.manager.block_size :] == block.token_ids

    @precondition(lambda self: hasattr(self, "manager"))
    @invariant()
    def off_publishes_nothing(self) -> None:
        assert self.manager.prefix_mode != "off" or not self.manager.hash_to_block_id

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for seq in list(self.seqs):
            self.leave(seq)
        for lease in list(self.manager.leases):
            self.manager.release(lease)
        assert len(self.manager.free_block_ids) == self.manager.num_blocks


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.long
class TestBlockManagerMachineLong(BlockManagerMachine.TestCase):  # type: ignore[name-defined]
    settings = settings(max_examples=4000, stateful_step_count=60, deadline=None)


@given(
    st.integers(0, 6),
    st.lists(st.tuples(st.sampled_from(["pop", "add", "cached", "remove"]), st.integers(0, 5)), max_size=40),
)
def test_free_blocks_against_a_naive_list(num_blocks: int, actions: list[tuple[str, int]]) -> None:
    free = FreeBlocks(range(num_blocks), LRUEviction())
    empty, cached, out = list(range(num_blocks)), [], []
    for action, pick in actions:
        if action == "pop" and empty + cached:
            expected = (empty or cached).pop(0)
            out.append(expected)
            assert free.pop() == expected
        elif action in ("add", "cached") and out:
            block_id = out.pop(pick % len(out))
            (cached if action == "cached" else empty).append(block_id)
            free.add(block_id, cached=action == "cached")
        elif action == "remove" and empty + cached:
            block_id = (empty + cached)[pick % len(empty + cached)]
            (empty if block_id in empty else cached).remove(block_id)
            free.remove(block_id)
            out.append(block_id)
        assert list(free) == empty + cached and len(free) == len(empty + cached)
        assert free.num_cached == len(cached) and all(block_id not in free for block_id in out)


def test_lru_removes_from_the_middle_without_a_scan() -> None:
    """O(1): the order is a linked dict, so no element is compared on the way to another."""
    lru = LRUEviction()
    assert isinstance(lru._order, OrderedDict)
    for block_id in range(5):
        lru.insert(block_id)
    lru.remove(2)
    lru.insert(2)
    assert [lru.victim() for _ in range(5)] == [0, 1, 3, 4, 2] and len(lru) == 0


def test_a_block_is_not_freed_twice() -> None:
    free = FreeBlocks(range(1), LRUEviction())
    assert free.pop() == 0
    with pytest.raises(KeyError):
        free.remove(0)
