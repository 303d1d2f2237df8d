"""The same tokens however the work is cut, ordered, paged, interrupted or reused.

Each run is held against a cold one of every prompt alone, whole, and without reuse.
Greedy and seeded sequences share each batch, so that both kinds are checked in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest
from exact_harness import greedy, limit, preempt_at, preempt_each_token, run, sharing_model, tokens

from nanovllm import LLM, SamplingParams
from nanovllm.engine.integrity import check_blocks
from nanovllm.errors import ExecutionError

CHUNKS = [1, 7, 16, 64, None]
BLOCK_SIZES = [1, 16, 64]
ORDERS = ["given", "reversed", "one_by_one"]
PREEMPTIONS = ["never", "once", "each_token"]
PREFIX = ["cold", "half_hit", "longest_hit"]
WHOLE = 4096
MAX_TOKENS = 5


def sampled(seed: int, max_tokens: int = MAX_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def text(length: int, salt: int, vocab: int) -> list[int]:
    return [(i * i * 11 + i * 29 + salt * 97) % vocab for i in range(length)]


PARAMS = [greedy(MAX_TOKENS), sampled(7), greedy(MAX_TOKENS), sampled(8), sampled(9)]
TINY_PROMPTS = [text(n, salt, 250) for salt, n in enumerate((1, 16, 65, 7, 33))]
SMOL_PROMPTS = [text(n, salt, 40_000) for salt, n in enumerate((1, 16, 18, 7, 5))]


class Bench:
    """One model, its cold answers, and engines of every block size over it."""

    def __init__(self, cold: LLM, prompts: list[list[int]]) -> None:
        self.cold, self.prompts, self.engines = cold, prompts, dict[Any, LLM]()
        self.expected = [tokens(run(cold, [p], [s]))[0] for p, s in zip(prompts, PARAMS, strict=True)]
        self.num_runs = 0

    def engine(self, block_size: int, **settings: Any) -> LLM:
        key = (block_size, *sorted(settings.items()))
        if key not in self.engines:
            settings = {"prefix_mode": "reuse", "num_blocks": 2048 // block_size, **settings}
            self.engines[key] = sharing_model(self.cold, block_size=block_size, kv_memory=None, **settings)
        return self.engines[key]

    def close(self) -> None:
        for llm in self.engines.values():
            llm.close()

    def check(self, case: tuple[Any, ...], llm: LLM, *, hook: Any = None, order: str = "given", salt: str = "") -> Any:
        """Run all prompts on `llm` and compare; the engine must be left without a trace of them."""
        pairs = list(enumerate(zip(self.prompts, PARAMS, strict=True)))
        pairs = pairs[::-1] if order == "reversed" else pairs
        groups = [[pair] for pair in pairs] if order == "one_by_one" else [pairs]
        results: dict[int, Any] = {}
        for group in groups:
            outputs = run(llm, [p for _, (p, _) in group], [s for _, (_, s) in group], between=hook, salt=salt)
            results |= dict(zip((i for i, _ in group), outputs, strict=True))
        assert tokens([results[i] for i in range(len(pairs))]) == self.expected, case
        self.assert_released(llm)
        return results

    def assert_released(self, llm: LLM) -> None:
        manager: Any = llm.engine.scheduler.kv
        check_blocks(manager.block_manager, [])
        assert len(manager.block_manager.free_block_ids) == manager.block_manager.num_blocks

    def cell(self, chunk: int | None, order: str, block_size: int, preemption: str, prefix: str) -> None:
        """One cell of the matrix."""
        case, self.num_runs = (chunk, order, block_size, preemption, prefix), self.num_runs + 1
        llm, salt = self.engine(block_size), f"cell {self.num_runs}"
        limit(llm, max_prefill_chunk=None)
        if prefix != "cold":
            share = 0.5 if prefix == "half_hit" else 1.0
            warm = [prompt[: int(len(prompt) * share)] or prompt for prompt in self.prompts]
            run(llm, warm, [greedy(1)] * len(warm), salt=salt)
        limit(llm, max_prefill_chunk=chunk)
        hook = {"never": None, "once": preempt_at(3), "each_token": preempt_each_token()}[preemption]
        results = self.check(case, llm, hook=hook, order=order, salt=salt)
        if prefix == "longest_hit" and block_size == 1:
            assert [r.cached_tokens for r in results.values()] == [r.prompt_len - 1 for r in results.values()], case


TINY_MODELS = ["tiny:random", "tiny:random-qwen2", "tiny:random-qwen3"]
ONE_HERE = pytest.mark.parametrize(  # the engine's work is the same for each; `long` has the others
    "tiny", [TINY_MODELS[0], *(pytest.param(name, marks=pytest.mark.long) for name in TINY_MODELS[1:])], indirect=True
)


@pytest.fixture(scope="module", params=TINY_MODELS)
def tiny(request: Any) -> Iterator[Bench]:
    with LLM(request.param, dtype="float32", num_blocks=128, prefix_mode="off") as cold:
        bench = Bench(cold, TINY_PROMPTS)
        yield bench
        bench.close()


@pytest.fixture(scope="module")
def smol(smollm2: LLM) -> Iterator[Bench]:
    bench = Bench(smollm2, SMOL_PROMPTS)
    yield bench
    bench.close()


# -- tiny models: everything on one, pairwise on the others; everything on each under `long` ----------


@ONE_HERE
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_tiny_matrix(tiny: Bench, chunk: int | None, block_size: int) -> None:
    for order, preemption, prefix in product(ORDERS, PREEMPTIONS, PREFIX):
        tiny.cell(chunk, order, block_size, preemption, prefix)


@pytest.mark.parametrize("mode", ["mixed", "separate"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_tiny_step_budget(tiny: Bench, mode: str, block_size: int) -> None:
    """The same sizes as the budget of whole steps, which decodes and prefills share."""
    llm = tiny.engine(block_size, prefix_mode="off", schedule_mode=mode)
    for budget in CHUNKS:
        limit(llm, max_num_batched_tokens=budget or WHOLE)
        tiny.check((mode, block_size, budget), llm)


@ONE_HERE
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("prefix_mode", ["off", "reuse"])
def test_tiny_preempted_after_every_step(tiny: Bench, block_size: int, prefix_mode: str) -> None:
    """One run for each step there is: after it, everybody who runs loses all blocks."""
    llm = tiny.engine(block_size, prefix_mode=prefix_mode)
    for chunk in (16, None):
        limit(llm, max_prefill_chunk=chunk)
        for step in range(10):
            hook = preempt_at(step)
            tiny.check((chunk, block_size, prefix_mode, step), llm, hook=hook, salt=f"{chunk} {step}")


@pytest.mark.long
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("prefix_mode", ["off", "reuse"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_tiny_preempted_after_every_step_of_small_chunks(
    tiny: Bench, block_size: int, prefix_mode: str, chunk: int
) -> None:
    llm = tiny.engine(block_size, prefix_mode=prefix_mode)
    limit(llm, max_prefill_chunk=chunk)
    for step in range(80):
        tiny.check((chunk, block_size, prefix_mode, step), llm, hook=preempt_at(step), salt=f"{chunk} {step}")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_tiny_pool_too_small_for_all(tiny: Bench, block_size: int) -> None:
    """Nobody forces a preemption here: the pool holds the longest request and little more."""
    blocks = sum(-(-len(prompt) // block_size) for prompt in TINY_PROMPTS) + 2 * len(TINY_PROMPTS) // block_size
    for prefix_mode in ("off", "reuse"):
        llm = tiny.engine(block_size, prefix_mode=prefix_mode, num_blocks=blocks)
        for chunk in CHUNKS:
            limit(llm, max_prefill_chunk=chunk)
            tiny.check((block_size, prefix_mode, chunk), llm)


@ONE_HERE
@pytest.mark.parametrize("chunk", CHUNKS)
def test_tiny_hit_of_every_length(tiny: Bench, chunk: int | None) -> None:
    check_every_hit(tiny, chunk, 1, index=4)


@pytest.mark.long
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_tiny_hit_of_every_length_and_block_size(tiny: Bench, chunk: int | None, block_size: int) -> None:
    check_every_hit(tiny, chunk, block_size, index=2)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_tiny_pool_full_of_garbage(tiny: Bench, block_size: int) -> None:
    """Blocks are not cleared when they change hands; what lies in them must not matter, not even NaN."""
    llm = tiny.engine(block_size)
    for number, garbage in enumerate((1e30, float("inf"), float("nan"))):
        limit(llm, max_prefill_chunk=7)
        runner: Any = llm.engine.runner
        runner.tier.pool.fill_(garbage)
        tiny.check((block_size, garbage), llm, salt=f"garbage {number}")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_no_number_in_one_sequence_fails_it_alone(tiny: Bench, block_size: int) -> None:
    """NaN in one sequence's own KV: it ends with an error, its neighbours say what they always say."""
    for victim in range(len(tiny.prompts)):
        llm = tiny.engine(block_size, prefix_mode="off")
        limit(llm, max_prefill_chunk=None)
        ids = [llm.engine.add_request(p, s) for p, s in zip(tiny.prompts, PARAMS, strict=True)]
        llm.engine.step()
        (seq,) = (seq for seq in llm.engine.scheduler.running if seq.request_id == ids[victim])
        runner: Any = llm.engine.runner
        runner.tier.pool[seq.block_table[0], :, :, :, 0] = float("nan")
        outputs: dict[str, Any] = {}
        while not llm.engine.is_finished():
            outputs |= {out.request_id: out.final for out in llm.engine.step() if out.final}
        failed = outputs.pop(ids[victim])
        assert isinstance(failed.error, ExecutionError) and failed.finish_reason == "error"
        assert failed.token_ids == tiny.expected[victim][:1]
        for i, request_id in enumerate(ids):
            assert i == victim or outputs[request_id].token_ids == tiny.expected[i], (victim, i)
        tiny.assert_released(llm)


def check_every_hit(bench: Bench, chunk: int | None, block_size: int, index: int) -> None:
    """Warm exactly h tokens of a prompt, then ask for all of it: each h from 0 to L - 1."""
    llm, prompt, params = bench.engine(block_size), bench.prompts[index], PARAMS[index]
    for hit in range(len(prompt)):
        salt = f"hit {chunk} {hit}"
        limit(llm, max_prefill_chunk=None)
        if hit:
            run(llm, [prompt[:hit]], [greedy(1)], salt=salt)
        limit(llm, max_prefill_chunk=chunk)
        (output,) = run(llm, [prompt], [params], salt=salt)
        assert output.cached_tokens == hit // block_size * block_size, (chunk, block_size, hit)
        assert output.token_ids == bench.expected[index], (chunk, block_size, hit)
        bench.assert_released(llm)


# -- pairwise; SmolLM2's everything under `long` ----------------------------------------------------

FACTORS: list[list[Any]] = [CHUNKS, ORDERS, BLOCK_SIZES, PREEMPTIONS, PREFIX]


def pairwise(factors: list[list[Any]]) -> list[tuple[Any, ...]]:
    """A small set of cells in which every two values of different factors meet: each time the cell that adds most.

    The slowest three values never meet in one cell; every two of them do.
    """
    indices = product(*(range(len(values)) for values in factors))
    slowest = (CHUNKS.index(1), ORDERS.index("one_by_one"), PREEMPTIONS.index("each_token"))
    cells = [cell for cell in indices if (cell[0], cell[1], cell[3]) != slowest]
    missing = {pair for cell in cells for pair in pairs_of(cell)}
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(missing & pairs_of(cell)))
        missing -= pairs_of(best)
        chosen.append(tuple(values[i] for values, i in zip(factors, best, strict=True)))
    return chosen


def pairs_of(cell: tuple[int, ...]) -> set[Any]:
    return set(combinations(enumerate(cell), 2))


def test_pairwise_covers_every_pair() -> None:
    cells = pairwise(FACTORS)
    assert len(cells) <= 22
    for (i, first), (j, second) in combinations(enumerate(FACTORS), 2):
        assert {(cell[i], cell[j]) for cell in cells} == set(product(first, second))


@pytest.mark.parametrize("tiny", TINY_MODELS[1:], indirect=True)
@pytest.mark.parametrize("cell", pairwise(FACTORS), ids=str)
def test_tiny_pairwise(tiny: Bench, cell: tuple[Any, ...]) -> None:
    tiny.cell(*cell)


@pytest.mark.model
@pytest.mark.parametrize("cell", pairwise(FACTORS), ids=str)
def test_smollm2_pairwise(smol: Bench, cell: tuple[Any, ...]) -> None:
    smol.cell(*cell)


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_smollm2_matrix(smol: Bench, chunk: int | None, block_size: int) -> None:
    for order, preemption, prefix in product(ORDERS, PREEMPTIONS, PREFIX):
        smol.cell(chunk, order, block_size, preemption, prefix)


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_smollm2_hit_of_every_length(smol: Bench, chunk: int | None) -> None:
    check_every_hit(smol, chunk, 1, index=2)
    check_every_hit(smol, chunk, 1, index=4)


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("prefix_mode", ["off", "reuse"])
def test_smollm2_preempted_after_every_step(smol: Bench, prefix_mode: str) -> None:
    for block_size, chunk in product(BLOCK_SIZES, (16, None)):
        llm = smol.engine(block_size, prefix_mode=prefix_mode)
        limit(llm, max_prefill_chunk=chunk)
        for step in range(12):
            case = (block_size, chunk, step)
            smol.check(case, llm, hook=preempt_at(step), salt=f"{prefix_mode} {case}")
