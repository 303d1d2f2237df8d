"""Fast kernels mean what the reference means: random shapes, batches, block tables, and garbage in the pool."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.kernels.c_library import compilers, march
from nanovllm.kernels.compiled import CompiledKernels
from nanovllm.kernels.cpu import CpuKernels
from nanovllm.kernels.interface import AttentionGeometry, Kernels, StepLayout
from nanovllm.kernels.packed_linear import PackedLinear
from nanovllm.kernels.paged import PagedKernels
from nanovllm.kernels.panel_linear import PanelLinear
from nanovllm.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
# as for an AVX2 machine:
CAPPED = CompiledKernels([march("x86-64-v3", compilers()[0])] if platform.machine() == "x86_64" else [])
CAPPED.name = "compiled without AVX-512"
MATRIX_UNIT = CompiledKernels()
MATRIX_UNIT.name, MATRIX_UNIT.has_matrix_unit = "compiled for AMX", True  # the same route, here without the speed
FAST = [CompiledKernels(), CAPPED, CpuKernels(), PagedKernels(), MATRIX_UNIT]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
LAYERS = 2

fast = pytest.mark.parametrize("kernels", FAST, ids=lambda kernels: kernels.name)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """bfloat16 keeps 8 bits: 3e-2 of the value, or of one."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- one operation at a time -----------------------------------------------------------------------

tokens = st.integers(1, 40)
seeds = st.integers(0, 2**31)


@fast
@both_dtypes
@thorough
@given(n=tokens, inner=st.integers(1, 200), outer=st.integers(1, 200), bias=st.booleans(), seed=seeds)
def test_linear(kernels: Kernels, dtype: torch.dtype, n: int, inner: int, outer: int, bias: bool, seed: int) -> None:
    x, weight = randn(seed, n, inner, dtype=dtype), randn(seed + 1, outer, inner, dtype=dtype) / inner**0.5
    added = randn(seed + 2, outer, dtype=dtype) if bias else None
    kept = weight.clone()
    product = kernels.linear(weight, added)
    weight.zero_()  # a packed weight is a copy, or the caller's tensor: see below
    if not isinstance(product, PackedLinear | PanelLinear):
        weight.copy_(kept)
    close(product(x), REFERENCE.linear(kept, added)(x))


@fast
@both_dtypes
@thorough
@given(
    n=tokens, width=st.integers(1, 300), heads=st.integers(0, 4), scale=st.sampled_from([1e-3, 1.0, 300.0]), seed=seeds
)
def test_rms_norm(
    kernels: Kernels, dtype: torch.dtype, n: int, width: int, heads: int, scale: float, seed: int
) -> None:
    """Over rows, and over the heads of one (Qwen3); inputs as small as the epsilon and as large as outliers."""
    shape = (n, heads, width) if heads else (n, width)
    x, weight = (randn(seed, *shape) * scale).to(dtype), randn(seed + 1, width, dtype=dtype)
    close(kernels.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))


@fast
@both_dtypes
@thorough
@given(n=tokens, width=st.integers(1, 300), seed=seeds)
def test_add_norm(kernels: Kernels, dtype: torch.dtype, n: int, width: int, seed: int) -> None:
    x, delta, weight = (randn(seed + i, *shape, dtype=dtype) for i, shape in enumerate(((n, width),) * 2 + ((width,),)))
    for ours, theirs in zip(
        kernels.add_norm(x.clone(), delta, weight, 1e-5), REFERENCE.add_norm(x, delta, weight, 1e-5), strict=True
    ):
        close(ours, theirs)


@fast
@both_dtypes
@thorough
@given(n=tokens, half=st.integers(1, 300), scale=st.sampled_from([0.1, 1.0, 30.0]), seed=seeds)
def test_silu_mul(kernels: Kernels, dtype: torch.dtype, n: int, half: int, scale: float, seed: int) -> None:
    x = (randn(seed, n, 2 * half) * scale).to(dtype)
    close(kernels.silu_mul(x), REFERENCE.silu_mul(x))


@fast
@both_dtypes
@thorough
@given(n=tokens, heads=st.integers(1, 9), half=st.integers(1, 64), seed=seeds)
def test_rope(kernels: ReferenceKernels, dtype: torch.dtype, n: int, heads: int, half: int, seed: int) -> None:
    angles = randn(seed + 1, n, 1, half) * 100
    x, cos, sin = randn(seed, n, heads, 2 * half, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype)
    close(kernels.rope(x, cos, sin), REFERENCE.rope(x, cos, sin))


@both_dtypes
def test_reference_rope_is_a_rotation(dtype: torch.dtype) -> None:
    """The reference itself: each pair (i, i + D / 2) is turned by its angle, as complex numbers are."""
    x, angles = randn(0, 5, 3, 8, dtype=dtype), randn(1, 5, 1, 4)
    turned = torch.view_as_complex(torch.stack(x.float().chunk(2, -1), -1)) * torch.polar(torch.ones(()), angles)
    expected = torch.cat((turned.real, turned.imag), -1).to(dtype)
    close(REFERENCE.rope(x, angles.cos().to(dtype), angles.sin().to(dtype)), expected)


# -- attention over the paged pool -----------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of random sequences: their contexts, how much of each is computed now, and where it lies."""

    contexts: list[int]
    queries: list[int]
    block_size: int
    kv_heads: int
    group: int
    head_dim: int
    window: int | None
    seed: int

    @property
    def geometry(self) -> AttentionGeometry:
        return AttentionGeometry(
            self.kv_heads * self.group, self.kv_heads, self.head_dim, self.head_dim**-0.5, self.window
        )

    def layout(self) -> StepLayout:
        """Blocks in random order, none shared; tables padded with block 0, which is somebody's."""
        counts = [-(-context // self.block_size) for context in self.contexts]
        order = iter(np.random.default_rng(self.seed).permutation(sum(counts)))
        tables = np.zeros((len(counts), max(counts)), np.int64)
        for row, count in zip(tables, counts, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        rows = np.repeat(np.arange(len(counts)), self.queries)
        positions = np.concatenate(
            [np.arange(context - query, context) for context, query in zip(self.contexts, self.queries, strict=True)]
        )
        return StepLayout(
            positions=torch.from_numpy(positions),
            query_lens=np.array(self.queries, np.int64),
            context_lens=np.array(self.contexts, np.int64),
            block_tables=torch.from_numpy(tables),
            slot_blocks=torch.from_numpy(tables[rows, positions // self.block_size]),
            slot_offsets=torch.from_numpy(positions % self.block_size),
        )

    def pool(self, dtype: torch.dtype) -> torch.Tensor:
        blocks = sum(-(-context // self.block_size) for context in self.contexts)
        return randn(self.seed, blocks, LAYERS, 2, self.kv_heads, self.block_size, self.head_dim, dtype=dtype)

    def qkv(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values side by side, and the cosines and sines of some angles."""
        count = sum(self.queries)
        wide = randn(self.seed + 1, count, self.kv_heads * (self.group + 2), self.head_dim, dtype=dtype)
        angles = randn(self.seed + 2, count, 1, self.head_dim // 2) * 100
        return wide, angles.cos().to(dtype), angles.sin().to(dtype)


@st.composite
def steps(draw: Any) -> Step:
    """Decodes, whole prefills and chunks behind a context, side by side."""
    pairs = draw(
        st.lists(st.tuples(st.integers(1, 200), st.sampled_from([1, 1, 2, 7, 64, 999])), min_size=1, max_size=8)
    )
    group, head_dim = (
        draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16])),
        draw(st.sampled_from([8, 16, 48, 64, 80, 128, 256])),
    )
    return Step(
        contexts=[context for context, _ in pairs],
        queries=[min(context, query) for context, query in pairs],
        block_size=draw(st.integers(1, 64)),
        kv_heads=draw(st.integers(1, 4 if group * head_dim <= 400 else 1)),
        group=group,
        head_dim=head_dim,
        window=draw(st.none() | st.integers(1, 250)),
        seed=draw(seeds),
    )


def attend(kernels: Kernels, step: Step, pool: torch.Tensor, layer: int = 1) -> torch.Tensor:
    plan = kernels.plan(step.layout(), pool, step.geometry)
    return kernels.attention(plan, layer, *step.qkv(pool.dtype))


@pytest.mark.parametrize("kernels", [REFERENCE, *FAST], ids=lambda kernels: kernels.name)
@settings(thorough, max_examples=20)
@given(step=steps(), extra=st.integers(1, 9))
def test_rows_beyond_the_plan_are_ignored(kernels: Kernels, step: Step, extra: int) -> None:
    """A step padded for the linears: the same KV and outputs, and numbers, whatever they are, in the other rows."""
    ours, theirs = step.pool(torch.float32), step.pool(torch.float32)
    expected = attend(kernels, step, theirs)
    wider = [torch.cat((part, torch.full_like(part[:1], 7.0).expand(extra, -1, -1))) for part in step.qkv(ours.dtype)]
    out = kernels.attention(kernels.plan(step.layout(), ours, step.geometry), 1, *wider)
    assert torch.equal(out[: len(expected)], expected) and out.shape[0] == len(expected) + extra
    assert out.isfinite().all() and torch.equal(ours, theirs)


@given(count=st.integers(0, 3000))
def test_padding_a_step_keeps_its_tokens_first(count: int) -> None:
    ids, linear = torch.arange(count), CpuKernels().linear(torch.zeros(16, 16), None)
    padded = CpuKernels().padded(ids, linear)
    assert torch.equal(padded[:count], ids) and len(padded) < count + 8
    assert len(CpuKernels().padded(padded, linear)) == len(padded)  # no linear pads again


@fast
@both_dtypes
@settings(thorough, max_examples=80)
@given(step=steps(), layer=st.integers(0, LAYERS - 1))
def test_attention_and_kv_writes(kernels: Kernels, dtype: torch.dtype, step: Step, layer: int) -> None:
    """The same outputs and the same KV of this layer; tokens computed before this step keep theirs in all layers.

    Slots that hold no token yet, behind a context or of layers to come, may be cleared by a kernel set.
    """
    ours, theirs, untouched = step.pool(dtype), step.pool(dtype), step.pool(dtype)
    close(attend(kernels, step, ours, layer), attend(REFERENCE, step, theirs, layer))
    layout = step.layout()
    for pool in (ours, theirs, untouched):
        for blocks, context in zip(layout.block_tables, step.contexts, strict=True):
            last, used = divmod(context - 1, step.block_size)
            pool[blocks[last], :, :, :, used + 1 :] = 0
    close(ours[:, layer, 0], theirs[:, layer, 0])  # keys are rotated, which rounds
    assert torch.equal(ours[:, layer, 1], theirs[:, layer, 1])
    for pool in (ours, untouched):
        pool[layout.slot_blocks, :, :, :, layout.slot_offsets] = 0
    assert torch.equal(ours, untouched)


@thorough
@given(step=steps())
def test_reference_attention_is_softmax(step: Step) -> None:
    """The reference itself, against one query, one head, one key at a time."""
    pool = step.pool(torch.float32)
    out = attend(REFERENCE, step, pool).view(sum(step.queries), -1, step.head_dim)
    qkv, cos, sin = step.qkv(torch.float32)
    q, layout = REFERENCE.rope(qkv[:, : step.geometry.num_heads], cos, sin), step.layout()
    rng, token = np.random.default_rng(step.seed), 0
    for i, (context, query) in enumerate(zip(step.contexts, step.queries, strict=True)):
        row, head = int(rng.integers(query)), int(rng.integers(q.shape[1]))
        position = context - query + row
        first = max(0, position + 1 - step.window) if step.window else 0
        places = [divmod(p, step.block_size) for p in range(first, position + 1)]
        cells = torch.stack([pool[layout.block_tables[i, b], 1, :, head // step.group, at] for b, at in places])
        scores = cells[:, 0] @ q[token + row, head] * step.geometry.scale
        close(out[token + row, head], scores.softmax(0) @ cells[:, 1])
        token += query


# Contexts past the 512 keys that torch's attention takes at once: with a window, whole tiles are masked.
LONG_STEPS = [Step([1500, 700, 3, 1100], [1, 1, 1, 1], 16, 3, 3, 64, window, 1) for window in (None, 1, 20, 600)] + [
    Step([1500, 700], [40, 700], 16, 3, 3, 64, window, 2) for window in (None, 1, 20, 600)
]


@fast
@both_dtypes
@pytest.mark.parametrize("step", LONG_STEPS, ids=str)
def test_long_contexts_and_windows(kernels: Kernels, dtype: torch.dtype, step: Step) -> None:
    ours, theirs = step.pool(dtype), step.pool(dtype)
    close(attend(kernels, step, ours), attend(REFERENCE, step, theirs))


@pytest.mark.parametrize("kernels", [*FAST, REFERENCE], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
@both_dtypes
@settings(thorough, max_examples=25)
@given(step=steps())
def test_nothing_leaks_from_slots_that_are_not_ours(
    kernels: Kernels, garbage: float, dtype: torch.dtype, step: Step
) -> None:
    """What the blocks' last owners left must not change one bit: not behind the context, not in padding.

    NaN and infinity too: a weight of zero times them is NaN, so a mask alone would let them through.
    All sequences are computed from the start: up to `queries`, then one token, then up to their contexts.
    """
    clean, dirty = torch.zeros_like(step.pool(dtype)), torch.full_like(step.pool(dtype), garbage)
    computed = [0] * len(step.contexts)
    for goal in (step.queries, [query + 1 for query in step.queries], step.contexts):
        targets = [min(pair) for pair in zip(goal, step.contexts, strict=True)]
        active = [i for i, (done, target) in enumerate(zip(computed, targets, strict=True)) if done < target]
        if active:
            expected = attend_part(kernels, step, clean, computed, targets, active)
            assert expected.isfinite().all()
            assert torch.equal(attend_part(kernels, step, dirty, computed, targets, active), expected)
        computed = targets


def attend_part(
    kernels: Kernels, step: Step, pool: torch.Tensor, starts: list[int], ends: list[int], active: list[int]
) -> torch.Tensor:
    """One step over tokens [start, end) of the active sequences, whose tables cover all of their contexts."""
    part = replace(step, contexts=[ends[i] for i in active], queries=[ends[i] - starts[i] for i in active])
    tables = step.layout().block_tables[active]
    layout = part.layout()
    rows = torch.from_numpy(np.repeat(np.arange(len(active)), part.queries))
    blocks = tables[rows, layout.positions // step.block_size]
    plan = kernels.plan(replace(layout, block_tables=tables, slot_blocks=blocks), pool, step.geometry)
    return kernels.attention(plan, 1, *part.qkv(pool.dtype))


@fast
@settings(thorough, max_examples=30)
@given(step=steps())
def test_a_sequence_does_not_depend_on_its_neighbours(kernels: Kernels, step: Step) -> None:
    """Alone or beside others, whatever these hold; group padding changes the order of sums, no more."""
    pool = step.pool(torch.float32)
    together = attend(kernels, step, pool.clone())
    layout, parts = step.layout(), step.qkv(torch.float32)
    token = 0
    for i, (context, query) in enumerate(zip(step.contexts, step.queries, strict=True)):
        span, blocks = slice(token, token + query), -(-context // step.block_size)
        alone = StepLayout(
            positions=layout.positions[span],
            query_lens=layout.query_lens[i : i + 1],
            context_lens=layout.context_lens[i : i + 1],
            block_tables=layout.block_tables[i : i + 1, :blocks],
            slot_blocks=layout.slot_blocks[span],
            slot_offsets=layout.slot_offsets[span],
        )
        poisoned = torch.full_like(pool, 1e30)
        mine = layout.block_tables[i, :blocks]
        poisoned[mine] = pool[mine]
        plan = kernels.plan(alone, poisoned, step.geometry)
        close(kernels.attention(plan, 1, *(part[span].clone() for part in parts)), together[span])
        token += query


@pytest.mark.parametrize("kernels", FAST[:2], ids=lambda kernels: kernels.name)
@both_dtypes
@settings(thorough, max_examples=25)
@given(
    length=st.integers(2, 700),
    cuts=st.sets(st.integers(1, 699), max_size=6),
    group=st.integers(1, 5),
    dim=st.sampled_from([16, 48, 64, 80]),
    window=st.none() | st.integers(1, 250),
    seed=seeds,
)
def test_cutting_a_prompt_into_chunks_changes_no_bit(
    kernels: Kernels,
    dtype: torch.dtype,
    length: int,
    cuts: set[int],
    group: int,
    dim: int,
    window: int | None,
    seed: int,
) -> None:
    """Pieces of two tokens or more; a piece of one is a decode, whose sums have another order."""
    whole = Step([length], [length], 16, 2, group, dim, window, seed)
    pool, parts, table = whole.pool(dtype), whole.qkv(dtype), whole.layout().block_tables
    together = attend(kernels, whole, pool.clone())
    ends = [cut for cut in sorted(cuts) if 1 < cut < length - 1] + [length]
    ends = [end for end, after in zip(ends, [*ends[1:], length + 2], strict=True) if after - end > 1]
    start = 0
    for end in ends:
        piece = replace(whole, contexts=[end], queries=[end - start])
        layout = piece.layout()
        blocks = table[0, layout.positions // 16]
        plan = kernels.plan(replace(layout, block_tables=table, slot_blocks=blocks), pool, whole.geometry)
        out = kernels.attention(plan, 1, *(part[start:end].clone() for part in parts))
        assert torch.equal(out, together[start:end])
        start = end
