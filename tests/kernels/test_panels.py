"""Weights in panels: any shape, any number of rows, and a row's bits are its own."""

from __future__ import annotations

import platform
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels import c_library
from nanovllm.kernels.compiled import CompiledKernels
from nanovllm.kernels.large_pages import CHUNK_BYTES, LargePages
from nanovllm.kernels.openmp import one_torch_thread, parallel
from nanovllm.kernels.panel_linear import PanelLinear, can_panel, in_panels

# as for an AVX2 machine:
CAPPED = [c_library.march("x86-64-v3", c_library.compilers()[0])] if platform.machine() == "x86_64" else []
BUILDS = [(dtype, flags) for dtype in c_library.DEFINES for flags in (None, CAPPED)]


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize("dtype, flags", BUILDS, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 500), inputs=st.integers(1, 60), outputs=st.integers(1, 150), has_bias=st.booleans(),
    is_float=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_product_is_the_weights(
    dtype: torch.dtype, flags: list[str] | None, rows: int, inputs: int, outputs: int, has_bias: bool, is_float: bool,
    seed: int,
) -> None:  # fmt: skip
    library = c_library.load(dtype, flags)
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, 2 * inputs), (outputs, 2 * inputs), (outputs,))
    )
    if not can_panel(weight, library):
        assert dtype == torch.bfloat16  # this build multiplies floats only
        return
    result = torch.float32 if is_float else dtype
    linear = PanelLinear(weight, bias if has_bias else None, library, parallel(), LargePages(), result)
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    tolerance = 1e-4 if result == torch.float32 else 1e-2
    torch.testing.assert_close(linear(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert linear(x).dtype == result
    cut = rows // 3
    assert torch.equal(linear(x), torch.cat([linear(x[:cut]), linear(x[cut:])]))  # neighbours change no bit


def test_panels_hold_each_weight_once_in_the_order_of_reading() -> None:
    weight = torch.arange(6.0).view(3, 2)
    assert in_panels(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 0, 5, 0]
    pairs = in_panels(torch.arange(8.0).view(2, 4).bfloat16(), 2)
    assert pairs.flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_what_is_no_whole_word_is_left_to_another_product() -> None:
    kernels = CompiledKernels()
    odd = torch.randn(8, 5).bfloat16()
    assert not isinstance(kernels.linear(odd, None), PanelLinear)
    assert isinstance(kernels.linear(odd.float(), None), PanelLinear)
    assert kernels.linear(odd.float(), None)(torch.randn(0, 5)).shape == (0, 8)


def test_torch_computes_in_one_thread_and_has_its_threads_again() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="inside"), one_torch_thread():
        assert torch.get_num_threads() == 1
        raise ValueError("inside")
    with one_torch_thread(is_wanted=False):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_a_thread_that_begins_meanwhile_has_torchs_threads() -> None:
    """Regression: torch's own setter changes what every new thread starts with, and a second engine got one thread."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with one_torch_thread():
            other = Thread(target=lambda: found.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert (found, torch.get_num_threads()) == ([2], 2)
    finally:
        torch.set_num_threads(before)


def test_copies_in_large_pages_are_aligned_and_apart() -> None:
    pages = LargePages()
    parts = [torch.arange(n, dtype=torch.int32) + n for n in (1, 100, 0, CHUNK_BYTES // 8, CHUNK_BYTES // 2, 7)]
    copies = [pages.copy(part) for part in parts]
    assert all(torch.equal(copy, part) for copy, part in zip(copies, parts, strict=True))
    assert all(copy.data_ptr() % 64 == 0 for copy in copies if len(copy))
    assert pages.copy(torch.ones(4, 6).T).is_contiguous()
