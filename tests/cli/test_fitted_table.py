"""Tables for any width: headers wrap and columns move below, but nothing is cut and no line is too long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.cli.fitted_table import Column, fitted

COLUMNS = [
    Column("case", ["first one", "  inner-most"]),
    Column("reserve-exact", ["1,024", "7"]),
    Column("fit at end", ["98.05%", "0.5%"]),
]


def test_what_fits_is_one_table() -> None:
    assert list(fitted(COLUMNS, 80)) == [
        "case          reserve-exact  fit at end",
        "first one             1,024      98.05%",
        "  inner-most              7        0.5%",
    ]


def test_what_does_not_fit_wraps_and_then_moves_below() -> None:
    assert list(fitted(COLUMNS, 30)) == [
        "              reserve-  fit at",
        "case             exact     end",
        "first one        1,024  98.05%",
        "  inner-most         7    0.5%",
    ]
    assert list(fitted(COLUMNS, 20)) == [
        "            reserve-",
        "case           exact",
        "first one      1,024",
        "  inner-",
        "  most             7",
        "",
        "              fit at",
        "case             end",
        "first one     98.05%",
        "  inner-most    0.5%",
    ]


TEXT = st.text("ab-, ", min_size=1, max_size=12).map(str.strip)
NUMBERS = st.lists(st.integers(0, 10**9).map(lambda n: f"{n:,}"), min_size=2, max_size=2)


@given(st.lists(st.builds(Column, TEXT, NUMBERS), min_size=1, max_size=6), st.integers(16, 90))
def test_every_figure_is_whole(columns: list[Column], width: int) -> None:
    lines = list(fitted([Column("row", ["one", "two"]), *columns], width))
    assert [n for c in columns for n in c.cells if n not in {w for line in lines for w in line.split()}] == []
    widest = max(column.least() for column in columns)
    assert all(len(line) <= max(width, 3 + 2 + widest) for line in lines)
