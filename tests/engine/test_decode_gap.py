"""How long a prompt's prefill may make those wait who decode: in tokens, which are the step's time."""

from __future__ import annotations

import pytest

from tests.engine.helpers import answer, greedy, make_bench

VOCAB = 16
LONG = [i % VOCAB for i in range(40)]


def lengths_of(mode: str, limit: int | None, streams: int) -> list[list[int]]:
    """Tokens of each sequence in the steps from a long prompt's arrival on, until it decodes itself."""
    bench = make_bench(num_blocks=64, vocab_size=VOCAB, mode=mode, max_prefill_beside_decode=limit)
    for i in range(streams):
        bench.engine.add_request([i], greedy(40))
    bench.step()
    steps: list[list[int]] = []
    bench.runner.before = lambda batch: steps.append(batch.query_lens.tolist())
    request_id = bench.engine.add_request(LONG, greedy(2))
    assert bench.drain()[request_id].token_ids == answer(LONG, 2, VOCAB)
    return [lengths for lengths in steps if max(lengths) > 1]


@pytest.mark.parametrize("streams", [1, 3])
def test_a_prompt_is_cut_shorter_while_others_decode(streams: int) -> None:
    """Each stream has its token in every step beside at most `limit` tokens of the prompt."""
    assert lengths_of("mixed", 15, streams) == [[1] * streams + [15], [1] * streams + [15], [1] * streams + [10]]


@pytest.mark.parametrize("mode, limit, streams", [("mixed", None, 2), ("mixed", 15, 0), ("separate", 15, 2)])
def test_alone_it_takes_the_whole_budget(mode: str, limit: int | None, streams: int) -> None:
    assert [max(lengths) for lengths in lengths_of(mode, limit, streams)] == [40]


def test_prompts_that_arrive_together_share_the_room() -> None:
    bench = make_bench(num_blocks=64, vocab_size=VOCAB, max_prefill_beside_decode=15)
    bench.engine.add_request([1], greedy(30))
    bench.step()
    totals: list[int] = []
    bench.runner.before = lambda batch: totals.append(int(batch.query_lens.sum()))
    ids = [bench.engine.add_request([i, *LONG[:11]], greedy(2)) for i in range(4)]
    done = bench.drain()
    assert [done[i].token_ids for i in ids] == [answer([i, *LONG[:11]], 2, VOCAB) for i in range(4)]
    assert totals[0] == 16 and max(totals) <= 15 + 5
