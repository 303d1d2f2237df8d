"""A packed linear compiles few products, and a row's result is its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels.packed_linear import ROW_COUNTS, PackedLinear, pieces

DTYPES = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
quick = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@quick
@given(rows=st.integers(1, 20_000))
def test_few_sizes_cover_any_number_of_rows(rows: int) -> None:
    """Each size is a compiled product that is kept: their number must not grow with what comes."""
    sizes = [len(piece) for piece in pieces(torch.empty(rows, 0))]
    assert set(sizes) <= set(ROW_COUNTS) and len(ROW_COUNTS) < 30
    assert rows <= sum(sizes) < rows + 8 and len(sizes) <= rows // 1024 + 5


class Recording(PackedLinear):
    """Remembers the numbers of rows that were really multiplied."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight, None)
        self.counts: set[int] = set()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        self.counts.add(len(x))
        return super().product(x)


def test_no_other_number_of_rows_is_ever_multiplied() -> None:
    linear = Recording(torch.randn(8, 8))
    for rows in range(1, 1300, 7):
        linear(torch.randn(rows, 8))
    for rows in range(1, 200):
        linear(torch.randn(rows, 8))
    assert linear.counts <= set(ROW_COUNTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner, outer", [(64, 48), (1536, 64), (576, 192)])
@quick
@given(rows=st.integers(1, 300), beside=st.integers(0, 300), before=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_a_row_does_not_depend_on_what_stands_beside_it(
    dtype: torch.dtype, inner: int, outer: int, rows: int, beside: int, before: int, seed: int
) -> None:
    """Not on padding, neighbours or place: with AVX-512 not one bit; elsewhere the order of sums may differ."""
    generator = torch.Generator().manual_seed(seed)
    linear = PackedLinear(torch.randn(outer, inner, generator=generator).to(dtype), None)
    x = torch.randn(before + rows + beside, inner, generator=generator).to(dtype)
    x[:before] = torch.nan
    x[before + rows :] = torch.inf
    alone, together = linear(x[before : before + rows]), linear(x)[before : before + rows]
    assert alone.isfinite().all() and together.isfinite().all()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert torch.equal(alone, together)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(alone.float(), together.float(), rtol=tolerance, atol=tolerance * inner**0.5)


@quick
@given(rows=st.integers(17, 64), seed=st.integers(0, 2**31))
def test_padding_changes_no_bit(rows: int, seed: int) -> None:
    """Other rows of the same piece stand where the padding stood: the same compiled product, the same bits."""
    x = torch.randn(-(-rows // 8) * 8, 64, generator=torch.Generator().manual_seed(seed))
    linear = PackedLinear(torch.randn(48, 64), None)
    assert torch.equal(linear(x[:rows]), linear(x)[:rows])


def test_an_empty_step_gives_nothing() -> None:
    assert PackedLinear(torch.randn(4, 8), None)(torch.empty(0, 8)).shape == (0, 4)
