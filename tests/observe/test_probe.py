"""The prefix-hit probe: against brute force, against the engine's own count, and that it changes nothing."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.core.digest import block_digest, root_digest
from nanovllm.observe import probe as probe_module
from nanovllm.observe.probe import ALL, STATEMENT, PrefixProbe, ShadowCache, total
from tests.engine.helpers import Bench, greedy, make_bench

Prompts = list[list[int]]
# Few tokens and short prompts: prefixes are shared, and blocks are full in all ways
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), max_size=12)


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def brute_force(prompts: Prompts, block_size: int) -> int:
    """Overlap without digests or indices: the longest whole-block prefix shared with any earlier prompt."""
    found = 0
    for i, prompt in enumerate(prompts):
        longest = max((common_prefix(prompt, earlier) for earlier in prompts[:i]), default=0)
        found += min(longest // block_size, (len(prompt) - 1) // block_size) * block_size
    return found


def observe(prompts: Prompts, **settings: Any) -> PrefixProbe:
    probe = PrefixProbe(**settings)
    for prompt in prompts:
        probe.entered(prompt)
    return probe


@given(prompts=PROMPTS, block_size=st.integers(1, 4))
def test_the_infinite_cache_is_the_longest_common_prefix(prompts: Prompts, block_size: int) -> None:
    figure = total(observe(prompts, block_sizes=[block_size]).figures(), block_size)
    assert figure.overlap_tokens == brute_force(prompts, block_size)
    assert (figure.tokens, figure.requests) == (sum(map(len, prompts)), len(prompts))


@given(prompts=PROMPTS)
def test_bounds_and_block_sizes_are_monotone(prompts: Prompts) -> None:
    bounds = [1, 2, 3, 5, 8, None]
    figures = observe(prompts, block_sizes=[1, 2, 4], capacities=bounds).figures()
    by_bound = [[total(figures, size, bound).overlap_tokens for bound in bounds] for size in (1, 2, 4)]
    assert all(row == sorted(row) for row in by_bound)
    infinite = [row[-1] for row in by_bound]
    assert infinite == sorted(infinite, reverse=True)  # 1 divides 2 divides 4
    assert all(f.overlap_tokens <= f.tokens - f.requests for f in figures)  # one token is always computed


def test_a_bounded_cache_forgets_by_hand() -> None:
    """Blocks of 1. Room for 3: [5 6 9] drives [1 2 9] out. Room for 4 keeps [1], then [5]."""
    prompts = [[1, 2, 9], [5, 6, 9], [1, 2, 8], [5, 6, 9]]
    figures = observe(prompts, block_sizes=[1], capacities=[3, 4, 6, None]).figures()
    assert [total(figures, 1, bound).overlap_tokens for bound in (3, 4, 6, None)] == [0, 2, 4, 4]


def test_namespaces_and_roots_share_nothing() -> None:
    probe = PrefixProbe([2])
    for namespace, root in (("a", None), ("a", None), ("b", None), ("b", b"salt"), ("b", b"salt")):
        probe.entered([1, 2, 3], namespace, root)
    by_name = {f.namespace: (f.requests, f.overlap_tokens, f.requests_with_overlap) for f in probe.figures()}
    assert by_name == {"a": (2, 2, 1), "b": (3, 2, 1), ALL: (5, 4, 2)}


def test_units_of_several_tokens() -> None:
    """A trace names blocks of 4 tokens; the last one may be partial, and is then no block."""
    probe = PrefixProbe([4, 8], unit_tokens=4)
    probe.entered([7, 8, 9], num_tokens=10)
    probe.entered([7, 8, 9], num_tokens=10)
    probe.entered([7, 8], num_tokens=8)  # its last token is in block 8
    assert [total(probe.figures(), size).overlap_tokens for size in (4, 8)] == [8 + 4, 8]


def test_an_infinite_cache_has_an_end_and_says_so() -> None:
    cache = ShadowCache(None, limit=2)
    cache.use([b"a", b"b"])
    assert not cache.is_truncated
    cache.use([b"c"])
    assert cache.is_truncated and cache.count_hits([b"a", b"b", b"c"]) == 2


@pytest.mark.parametrize("settings", [{"block_sizes": []}, {"block_sizes": [6], "unit_tokens": 4}, {"capacities": [0]}])
def test_what_cannot_be_observed_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        PrefixProbe(**settings)


# -- beside an engine ------------------------------------------------------------------------------


def shared_prompts(seed: int, count: int = 12) -> Prompts:
    """Prompts that begin with one of three documents and go on by themselves."""
    draw = random.Random(seed)
    documents = [[draw.randrange(16) for _ in range(draw.randrange(5, 30))] for _ in range(3)]
    return [draw.choice(documents) + [draw.randrange(16) for _ in range(draw.randrange(1, 9))] for _ in range(count)]


def run_one_by_one(bench: Bench, prompts: Prompts) -> list[Any]:
    finals = []
    for prompt in prompts:
        request_id = bench.engine.add_request(prompt, greedy(5))
        finals.append(bench.drain()[request_id])
    return finals


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_the_engines_observe_mode(seed: int, block_size: int) -> None:
    """One after the other in a pool that forgets nothing: both count the same, completions included."""
    bench, probe = make_bench(num_blocks=2048, block_size=block_size, prefix_mode="observe"), PrefixProbe([block_size])
    bench.engine.observers.add(probe)
    prompts = shared_prompts(seed)
    finals = run_one_by_one(bench, prompts)
    again = finals[0].prompt_token_ids + finals[0].token_ids + [3]  # a second turn: its history was generated here
    finals += run_one_by_one(bench, [again])
    figure = total(probe.figures(), block_size)
    assert figure.overlap_tokens == sum(final.potential_cached_tokens for final in finals) > 0
    assert finals[-1].potential_cached_tokens == (len(again) - 2) // block_size * block_size
    assert sum(final.cached_tokens for final in finals) == 0


class Keeper:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[int], bytes]] = []

    def entered(self, token_ids: Any, namespace: str, root: bytes) -> None:
        self.told.append(("entered", token_ids, root))

    def finished(self, token_ids: Any, namespace: str, root: bytes) -> None:
        self.told.append(("finished", token_ids, root))


def test_its_digests_are_the_engines() -> None:
    """A published block has the digest that the probe gives it: recordings of both can be joined."""
    bench, keeper = make_bench(block_size=4), Keeper()
    bench.engine.observers.add(keeper)
    bench.engine.add_request([1, 2, 3, 4, 5], greedy(4), namespace="tenant")
    bench.drain()
    (_, prompt, root), (_, computed, _) = keeper.told
    assert prompt == [1, 2, 3, 4, 5] and len(computed) == 8
    first = block_digest(root, computed[:4])
    assert set(bench.manager.hash_to_block_id) == {first, block_digest(first, computed[4:])}
    assert root == root_digest({"weights": "shadow", "namespace": "tenant", "salt": ""})


def trace_of(prompts: Prompts, probed: bool, **settings: Any) -> tuple[list[Any], list[Any]]:
    """Everything that was decided and produced: each event with its moment, each output."""
    bench = make_bench(num_blocks=24, block_size=4, simulated=True, **settings)
    if probed:
        bench.engine.observers.add(PrefixProbe([4, 8], [None, 16]))
    ids = [bench.engine.add_request(prompt, greedy(30)) for prompt in prompts]
    finals = bench.drain()
    events = bench.engine.events.reader(from_start=True).poll()
    return list(events), [(finals[i].token_ids, finals[i].cached_tokens) for i in ids]


@pytest.mark.parametrize("prefix_mode", ["off", "observe", "reuse"])
def test_schedule_and_tokens_are_identical_with_it(prefix_mode: str) -> None:
    """A pool that is too small, so that there are preemptions to get wrong: every event at its nanosecond."""
    prompts = shared_prompts(7)
    plain, probed = (trace_of(prompts, on, prefix_mode=prefix_mode) for on in (False, True))
    assert plain == probed
    assert any(getattr(event, "stage", "") == "preempted" for event in plain[0])


def test_tokens_are_identical_with_it_on_a_real_model() -> None:
    from nanovllm import LLM, SamplingParams

    answers = []
    for probed in (False, True):
        with LLM("tiny:random", num_blocks=64, progress=False) as llm:
            probe = PrefixProbe()
            if probed:
                llm.engine.observers.add(probe)
            params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, n=2)
            prompts = [[t * 16 % 256 for t in prompt] for prompt in shared_prompts(1)]
            outputs = llm.generate(prompts, params)
            answers.append([[c.token_ids for c in out.completions] for out in outputs])
        assert total(probe.figures(), 16).requests == (2 * len(prompts) if probed else 0)
    assert answers[0] == answers[1]


def test_an_observer_that_raises_is_taken_off_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bench, probe = make_bench(), PrefixProbe([4])

    class Broken:
        def entered(self, *what: object) -> None:
            raise RuntimeError("broken probe")

        finished = entered

    bench.engine.observers.add(Broken())
    bench.engine.observers.add(probe)
    with caplog.at_level("WARNING", logger="nanovllm"):
        finals = run_one_by_one(bench, [[1, 2, 3], [1, 2, 4]])
    assert [final.finish_reason for final in finals] == ["length", "length"]
    assert caplog.text.count("was taken off") == 1
    assert total(probe.figures(), 4).requests == 2
    assert bench.engine.bad_steps_in_a_row == 0


def test_only_what_finished_is_told_as_finished() -> None:
    """An aborted request's last tokens may have no KV; a prefill-only one has KV for all of its tokens."""
    bench, keeper = make_bench(block_size=2), Keeper()
    bench.engine.observers.add(keeper)
    bench.engine.add_request([1, 2, 3], greedy(50), request_id="a")
    for _ in range(8):
        bench.step()
    bench.engine.abort("a")
    bench.engine.add_request([4, 5], prefill_only=True)
    bench.drain()
    bench.engine.observers.remove(keeper)
    bench.engine.add_request([6])
    bench.drain()
    assert [told[:2] for told in keeper.told] == [("entered", [1, 2, 3]), ("entered", [4, 5]), ("finished", [4, 5])]


# -- what it may say -------------------------------------------------------------------------------


def test_every_figure_says_what_it_is() -> None:
    for figure in observe([[1, 2, 3]] * 2, block_sizes=[1, 2], capacities=[None, 4]).figures():
        data = figure.as_dict()
        assert (data["label"], data["statement"]) == ("observe-only", STATEMENT)
        assert STATEMENT in str(figure) and "observe-only" in str(figure)


def test_no_name_in_it_promises_anything() -> None:
    """Whatever is computed is called overlap. The one sentence with `gain` denies it."""
    text = Path(probe_module.__file__).read_text(encoding="utf-8").replace(STATEMENT, "").lower()
    assert not re.findall(r"gain|speed.?up|saving|saved|benefit|faster", text.replace("against", ""))
