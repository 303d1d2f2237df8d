"""Weights that stay in the groups of a quantised file: what they stand for, and the product of few rows with them."""

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import c_library
from nanovllm.kernels.compiled import CompiledKernels
from nanovllm.kernels.grouped_linear import FEW, GroupedLinear
from nanovllm.kernels.grouped_weight import GROUP, GroupedWeight
from nanovllm.kernels.interface import Linear
from nanovllm.kernels.large_pages import LargePages
from nanovllm.kernels.matrix_unit_linear import FEW_ROWS, MatrixUnitLinear
from nanovllm.kernels.openmp import parallel
from nanovllm.kernels.packed_linear import PackedLinear
from nanovllm.kernels.panel_linear import PanelLinear
from nanovllm.kernels.whole_decoder import CompiledDecoder
from nanovllm.models.gguf_groups import grouped_rows

MULTIPLIES_BFLOAT16 = c_library.load(torch.bfloat16).panel_width() > 0


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its route, on a processor that may not have it."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


@pytest.fixture(params=[None, "amx"])
def processor(request: pytest.FixtureRequest) -> None:
    if request.param:
        request.getfixturevalue(request.param)


def own(linear: Linear) -> Linear:
    """What computes few rows, where the processor multiplies matrices of many."""
    return linear.few if isinstance(linear, MatrixUnitLinear) else linear


def drawn(outputs: int, inputs: int, bits: int, seed: int = 0) -> GroupedWeight:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (outputs, inputs), np.uint8)
    scales = rng.uniform(0.001, 0.02, (outputs, inputs // GROUP)).astype(np.float32)
    return GroupedWeight(codes, scales, -scales * 2 ** (bits - 1), bits)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0])
def test_groups_stand_for_what_the_file_does(kind: Q) -> None:
    rows = quantize(np.random.default_rng(1).normal(size=(16, 128)).astype(np.float32), kind)
    weight = grouped_rows(rows, kind)
    assert weight is not None and weight.codes.shape == (16, 128)
    np.testing.assert_allclose(weight.restored().numpy(), dequantize(rows, kind), rtol=0, atol=1e-6)


def test_other_types_and_damaged_scales_are_no_groups() -> None:
    assert grouped_rows(np.zeros((2, 210), np.uint8), Q.Q6_K) is None
    damaged = quantize(np.ones((2, 64), np.float32), Q.Q4_1)
    damaged[0, :2] = (0x00, 0x7C)  # an infinite scale
    assert grouped_rows(damaged, Q.Q4_1) is None


def test_parts_are_stacked_where_all_are_grouped() -> None:
    a, b = drawn(16, 64, 4), drawn(32, 64, 4, seed=1)
    both = GroupedWeight.stacked([a, b])
    assert both is not None and torch.equal(both.restored(), torch.cat((a.restored(), b.restored())))
    mixed = GroupedWeight.stacked([a, c := drawn(16, 64, 8)])
    assert mixed is not None and mixed.bits == 8
    assert torch.equal(mixed.restored(), torch.cat((a.restored(), c.restored())))
    assert GroupedWeight.stacked([a, None]) is None


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, FEW),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 9),
    bits=st.sampled_from((4, 8)),
    has_bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    is_head=st.booleans(),
)
def test_the_product_is_that_of_the_restored_weight(
    rows: int, inputs: int, outputs: int, bits: int, has_bias: bool, dtype: torch.dtype, is_head: bool
) -> None:
    weight = drawn(outputs * 16, inputs * 64, bits)
    result = torch.float32 if is_head else dtype
    x = torch.randn(rows, inputs * 64).to(dtype)
    bias = torch.randn(outputs * 16).to(dtype) if has_bias else None
    many = PackedLinear(torch.zeros(outputs * 16, inputs * 64), None)
    linear = GroupedLinear(weight, bias, many, c_library.load(dtype), parallel(), LargePages(), result)
    expected = x.double() @ weight.restored().double().T + (0 if bias is None else bias.double())
    tolerance = {torch.float32: 5e-5, torch.bfloat16: 8e-3}[result]
    torch.testing.assert_close(linear(x).double(), expected, rtol=tolerance, atol=tolerance)
    alone = torch.cat([linear(x[i : i + 1]) for i in range(rows)])
    assert torch.equal(linear(x), alone)  # neighbours change no bit


@pytest.mark.usefixtures("processor")
def test_only_bfloat16_and_only_few_rows_use_the_groups() -> None:
    kernels, weight = CompiledKernels(), drawn(32, 128, 4)
    plain = weight.restored()
    assert isinstance(kernels.linear(plain, None, lambda: weight), PanelLinear)
    odd = drawn(24, 128, 4)
    rounded = plain.bfloat16()
    linear = kernels.linear(rounded, None, lambda: weight)
    assert isinstance(own(linear), GroupedLinear) == MULTIPLIES_BFLOAT16
    if not MULTIPLIES_BFLOAT16:
        pytest.skip("no products of bfloat16 on this processor")
    assert not isinstance(own(kernels.linear(odd.restored().bfloat16(), None, lambda: odd)), GroupedLinear)
    x = torch.randn(FEW + 1, 128).bfloat16()
    torch.testing.assert_close(linear(x)[:1], linear(x[:1]), rtol=0.02, atol=0.02)
    assert linear(x[:0]).shape == (0, 32)  # a step in which no row samples


@pytest.mark.usefixtures("amx")
def test_a_matrix_unit_computes_many_rows_and_no_few() -> None:
    kernels, weight = CompiledKernels(), torch.randn(32, 64)
    linear = kernels.linear(weight.bfloat16(), None)
    if not MULTIPLIES_BFLOAT16:
        pytest.skip("no products of bfloat16 on this processor")
    assert isinstance(linear, MatrixUnitLinear) and isinstance(linear.many, PackedLinear)
    few, many = (torch.randn(FEW_ROWS + i, 64).bfloat16() for i in (0, 1))
    assert torch.equal(linear(few), linear.few(few)) and torch.equal(linear(many), linear.many(many))
    ids = torch.arange(FEW_ROWS + 1)
    assert len(kernels.padded(ids, linear)) == linear.many.rows(FEW_ROWS + 1)
    assert len(kernels.padded(ids[1:], linear)) == FEW_ROWS
    assert isinstance(kernels.linear(weight, None), PanelLinear)  # float32 has no unit
    assert [kernels.copies_of_weights(dtype) for dtype in (torch.bfloat16, torch.float32)] == [2, 1]


@pytest.mark.usefixtures("processor")
def test_the_default_model_decodes_from_its_groups() -> None:
    with LLM("smollm2", dtype="bfloat16", num_blocks=64, max_model_len=256) as llm:
        model = llm.engine.runner.model  # type: ignore[attr-defined]
        assert isinstance(own(model.head), GroupedLinear) == MULTIPLIES_BFLOAT16
        out = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=12))[0]
    assert "Paris" in out.text


@pytest.mark.usefixtures("amx")
def test_with_amx_a_step_of_few_rows_has_the_bits_of_its_layers() -> None:
    steps_have_the_bits_of_their_layers("bfloat16", 24)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("budget", [24, 140])  # the larger one gives each thread rows of its own
def test_a_step_in_one_call_has_the_bits_of_its_layers(dtype: str, budget: int) -> None:
    steps_have_the_bits_of_their_layers(dtype, budget)


def steps_have_the_bits_of_their_layers(dtype: str, budget: int) -> None:
    """Chunks of prompts, decodes beside them, few rows and many, more of them than there is room reserved for."""
    prompts = [[7, 8, 9, 10 + i] * (1 + budget // 8 * i) for i in range(7)]
    params = [SamplingParams(temperature=0, max_tokens=4 + 2 * i, logprobs=3, ignore_eos=True) for i in range(7)]
    how = {"max_num_batched_tokens": budget, "num_blocks": 160, "max_model_len": 512, "prefix_mode": "off"}
    with LLM("smollm2", dtype=dtype, **how) as llm:
        model = llm.engine.runner.model  # type: ignore[attr-defined]
        if model.whole is not None:
            model.whole.reserve(3)
        together = llm.generate(prompts, params)
        whole, model.whole = model.whole, None
        one_by_one = llm.generate(prompts, params)
    assert isinstance(whole, CompiledDecoder) == isinstance(own(model.head), GroupedLinear | PanelLinear)
    for a, b in zip(together, one_by_one, strict=True):
        assert a.token_ids == b.token_ids and a.completions[0].logprobs == b.completions[0].logprobs


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.usefixtures("torch_threads")
def test_the_last_rows_of_a_long_prompt_are_computed_as_the_others(num_threads: int) -> None:
    """1,057 rows leave a block of one to a thread, whether there are one or two: it is no step of one row."""
    torch.set_num_threads(num_threads)
    prompt = [7, 8, 9] * 352 + [10]
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=3, ignore_eos=True)
    with LLM("smollm2", dtype="bfloat16", num_blocks=80, max_model_len=1200, prefix_mode="off") as llm:
        model = llm.engine.runner.model  # type: ignore[attr-defined]
        assert (model.whole is not None) == MULTIPLIES_BFLOAT16
        together = llm.generate([prompt], params)[0]
        model.whole = None
        one_by_one = llm.generate([prompt], params)[0]
    assert together.completions[0].logprobs == one_by_one.completions[0].logprobs


def test_a_team_serves_calls_one_after_another_and_ends() -> None:
    """Sums over rows of a product that four threads share on whatever cores there are: no item lost, none twice."""
    library, weight = c_library.load(torch.float32), drawn(64 * 16, 64, 8)
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    x = torch.randn(2, 64)
    linear = GroupedLinear(
        weight, None, PackedLinear(weight.restored(), None), library, None, LargePages(), torch.float32
    )
    alone, team = linear(x), library.team_open(3)
    parallel = ctypes.cast(library.team_parallel, ctypes.c_void_p)
    y = torch.zeros_like(alone)
    for _ in range(200):
        y.zero_()
        library.team_call(team)
        library.grouped_linear(ctypes.byref(linear.args(x.data_ptr(), y.data_ptr(), 2)), parallel, 4)
        library.team_dismiss(team)
        assert torch.equal(y, alone)
    library.team_close(team)
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before
