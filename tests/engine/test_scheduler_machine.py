"""The whole engine as a state machine: whatever happens, each answer is a function of its prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.exec_batch import ExecBatch
from nanovllm.engine.outputs import StepOutput
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ContextLengthError
from tests.engine.fakes import FakeStatePlane, Load
from tests.engine.helpers import Injected, answer, greedy, make_bench, stub_digest

VOCAB, EOS = 16, (3,)
PREFIXES = ([], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9, 9])
KNOBS = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 5),
        "num_blocks": st.integers(6, 24),
        "prefix_mode": st.sampled_from(["reuse", "reuse", "observe", "off"]),
        "policy": st.sampled_from(["fcfs", "priority", "sjf"]),
        "mode": st.sampled_from(["mixed", "mixed", "separate"]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([1, 3, 8, 64]),
        "max_new_requests_per_step": st.sampled_from([None, 1, 2]),
        "prefill_during_decode": st.booleans(),
        "max_prefill_chunk": st.sampled_from([None, 1, 4]),
        "max_prefill_beside_decode": st.sampled_from([None, 1, 5]),
        "watermark_blocks": st.integers(0, 2),
    }
)


class EngineMachine(RuleBasedStateMachine):
    """Adds, steps, aborts, promotes, preempts and loads, in any order."""

    @initialize(knobs=KNOBS, bits=st.sampled_from([None, None, 2]))
    def start(self, knobs: dict[str, Any], bits: int | None) -> None:
        self.loads: list[Load] = []
        digest = {} if bits is None else {"digest_fn": stub_digest(bits)}
        self.bench = make_bench(kv=self.with_plane, vocab_size=VOCAB, eos=EOS, **knobs, **digest)
        self.bench.runner.before = self.check_batch
        self.policy = self.bench.scheduler.policy
        self.expected: dict[str, list[list[int]] | None] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.aborted: set[str] = set()
        self.finals: dict[str, Any] = {}

    def with_plane(self, device: Any, runner: Any) -> FakeStatePlane:
        self.plane = FakeStatePlane(device, self.plan, runner.write)
        return self.plane

    def plan(self, seq: Sequence) -> Load | None:
        return self.loads.pop() if self.loads else None

    def check_batch(self, batch: ExecBatch) -> None:
        assert 0 < len(batch.query_lens) <= self.policy.max_num_seqs
        assert batch.query_lens.min() >= 1 and batch.query_lens.sum() <= self.policy.max_num_batched_tokens
        assert batch.query_lens.max() <= max(self.policy.max_prefill_chunk or 10**6, 1)

    # -- rules -----------------------------------------------------------------------------------

    @rule(
        prefix=st.sampled_from(PREFIXES),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=12),
        max_tokens=st.integers(1, 9),
        ignore_eos=st.booleans(),
        priority=st.integers(0, 2),
        prefill_only=st.sampled_from([False, False, False, True]),
        n=st.sampled_from([1, 1, 1, 3]),
    )
    def add(self, prefix: list[int], tail: list[int], max_tokens: int, ignore_eos: bool, n: int, **how: Any) -> None:
        prompt, engine = [*prefix, *tail], self.bench.engine
        if not prompt:
            return
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos, n=n)
        try:
            request_id = engine.add_request(prompt, params, **how)
        except ContextLengthError:
            assert len(prompt) >= engine.intake.max_model_len
            return
        limit = min(max_tokens, engine.intake.max_model_len - len(prompt))
        wanted = answer(prompt, limit, VOCAB, () if ignore_eos else EOS)
        self.expected[request_id] = [[]] * n if how["prefill_only"] else [wanted] * n

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.take(self.bench.step())

    @rule(pick=st.integers(0, 100))
    def abort(self, pick: int) -> None:
        open_ids = [request_id for request_id in self.expected if request_id not in self.finals]
        if open_ids:
            request_id = open_ids[pick % len(open_ids)]
            if self.bench.engine.abort(request_id):
                self.aborted.add(request_id)
            assert not self.bench.engine.abort(request_id), "an abort that repeats does nothing"

    @rule(pick=st.integers(0, 100))
    def promote(self, pick: int) -> None:
        waiting = [s for s in self.bench.scheduler.live() if s.prefill_only]
        if waiting:
            seq = waiting[pick % len(waiting)]
            self.bench.engine.promote(seq.request_id)
            limit = seq.max_total_tokens - seq.num_prompt_tokens
            wanted = answer(seq.token_ids[: seq.num_prompt_tokens], limit, VOCAB, seq.eos_token_ids)
            n = len(self.expected[seq.request_id] or [])
            self.expected[seq.request_id] = [wanted] * n if n == 1 else None  # others may have ended already

    @rule(pick=st.integers(0, 100))
    def preempt(self, pick: int) -> None:
        running = self.bench.scheduler.running
        if running:
            self.bench.scheduler.preempt(running[pick % len(running)])

    @rule(delay=st.integers(1, 6), ok=st.booleans(), num_tokens=st.sampled_from([1, 4, 10**6]))
    def will_load(self, delay: int, ok: bool, num_tokens: int) -> None:
        self.loads.append(Load(delay, ok, num_tokens))

    @rule()
    def runner_fails(self) -> None:
        self.bench.runner.fail_next = Injected("broken")
        running = {s.request_id for s in self.bench.scheduler.live()}
        outputs = self.bench.step()
        self.bench.runner.fail_next = None
        failed = {s.request_id for s in outputs if s.finish_reason == "error"}
        assert failed <= running
        self.aborted |= failed
        self.take(outputs)

    # -- what must hold --------------------------------------------------------------------------

    def take(self, outputs: list[StepOutput]) -> None:
        for out in outputs:
            self.got.setdefault((out.request_id, out.index), []).extend(out.token_ids)
            if out.final is not None:
                assert out.request_id not in self.finals, "a request ends once"
                self.finals[out.request_id] = out.final
                self.check_final(out.request_id, out.final)

    def check_final(self, request_id: str, final: Any) -> None:
        wanted = self.expected[request_id]
        for completion in final.completions:
            assert completion.token_ids == self.got.get((request_id, completion.index), [])
            if wanted is None:
                continue
            if completion.finish_reason in ("abort", "error"):
                assert request_id in self.aborted
                assert completion.token_ids == wanted[completion.index][: len(completion.token_ids)]
            else:
                assert completion.token_ids == wanted[completion.index]

    @precondition(lambda self: hasattr(self, "bench"))
    @invariant()
    def queues_are_in_rank_order_and_disjoint(self) -> None:
        s = self.bench.scheduler
        for queue in (s.waiting, s.running):
            assert queue == sorted(queue, key=self.policy.queue_key)
        assert len(s.live()) == len({id(seq) for seq in s.live()})
        assert all(seq.num_scheduled_tokens == 0 for seq in s.live())

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.loads.clear()
        work = sum(seq.num_tokens + seq.max_total_tokens for seq in self.bench.scheduler.live())
        for _ in range(100 + 4 * work):  # at one token a step, with what preemption may waste
            if self.bench.engine.is_finished() and self.plane.is_settled():
                break
            self.take(self.bench.step())
        assert self.bench.engine.is_finished(), "somebody starves"
        assert set(self.finals) == set(self.expected)
        assert not self.bench.manager.used_block_ids and not self.bench.manager.leases
        n_of = {request_id: len(final.completions) for request_id, final in self.finals.items()}
        for request_id, n in n_of.items():
            assert len(self.bench.terminals(request_id)) == n


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.long
class TestEngineMachineLong(EngineMachine.TestCase):  # type: ignore[name-defined]
    settings = settings(max_examples=2000, stateful_step_count=60, deadline=None)


def test_the_shadow_runner_notices_what_it_is_for() -> None:
    """A wrong table and a poisoned slot do not pass."""
    bench = make_bench(block_size=2, vocab_size=VOCAB)
    request_id = bench.engine.add_request([1, 2, 3, 4, 5], greedy(8))
    bench.step()
    (seq,) = bench.scheduler.running
    seq.block_table[0], seq.block_table[1] = seq.block_table[1], seq.block_table[0]
    outputs = bench.engine.step()
    assert outputs[0].finish_reason == "error"
    assert "another prefix" in str(outputs[0].final.error.__cause__)  # type: ignore[union-attr]
    assert bench.terminals(request_id) == ["failed"]
