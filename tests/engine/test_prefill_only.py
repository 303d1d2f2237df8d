"""Requests that only prefill: they yield, can be cancelled at a chunk border, and can be promoted."""

from __future__ import annotations

import pytest

from tests.engine.helpers import answer, greedy
from tests.engine.test_defects import LONG, VOCAB, bench_of, serve


def test_prefill_only_emits_nothing_and_leaves_its_kv() -> None:
    bench = bench_of()
    final = serve(bench, LONG[:16], prefill_only=True)
    assert (final.token_ids, final.text, final.finish_reason) == ([], "", "prefilled")
    assert serve(bench, [*LONG[:16], 1]).cached_tokens == 16


@pytest.mark.parametrize("mode", ["mixed", "separate"])
def test_prefill_only_yields_to_everybody(mode: str) -> None:
    bench = bench_of(mode=mode, max_num_batched_tokens=4)
    bench.engine.add_request(LONG[:40], greedy(1), prefill_only=True)
    bench.step()
    bench.engine.add_request(LONG[50:58], greedy(5))
    (background,) = [s for s in bench.scheduler.running if s.prefill_only]
    before = background.num_cached_tokens
    for _ in range(2):
        bench.step()
    assert background.num_cached_tokens == before, "the prompt has the whole budget"
    for _ in range(4):
        bench.step()
    gained = background.num_cached_tokens - before
    assert gained == (4 * 3 if mode == "mixed" else 0), "it gets what the decodes leave"
    bench.drain()


def test_prefill_only_gives_its_blocks_up() -> None:
    bench = bench_of(num_blocks=10, max_num_batched_tokens=8)
    background = bench.engine.add_request(LONG[:32], greedy(1), prefill_only=True)
    bench.step()
    request_id = bench.engine.add_request(LONG[40:56], greedy(4))
    finals = bench.drain()
    assert finals[request_id].token_ids == answer(LONG[40:56], 4, VOCAB)
    assert finals[request_id].timeline.preempted_ns == [] and finals[background].timeline.preempted_ns


def test_a_prefill_cancelled_at_a_chunk_border_keeps_its_full_blocks() -> None:
    bench = bench_of(max_prefill_chunk=6)
    request_id = bench.engine.add_request(LONG[:30], greedy(1), prefill_only=True)
    bench.step()
    bench.step()
    bench.engine.abort(request_id)
    assert not bench.manager.used_block_ids
    assert serve(bench, LONG[:30]).cached_tokens == 12


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_promoted_it_decodes(steps: int) -> None:
    bench = bench_of(max_prefill_chunk=6)
    request_id = bench.engine.add_request(LONG[:30], greedy(4), prefill_only=True)
    for _ in range(steps):
        bench.step()
    bench.engine.promote(request_id)
    assert bench.drain()[request_id].token_ids == answer(LONG[:30], 4, VOCAB)
