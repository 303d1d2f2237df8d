"""The envelope: the right bytes or a reason, whatever happened to them."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.state.envelope import (
    MAX_LABEL,
    BadEnvelope,
    Label,
    pack_tokens,
    read_header,
    seal,
    sealed_size,
    unseal,
)

LABEL = Label(
    key=b"k" * 32,
    kind="kv",
    namespace="a",
    layout="16x2",
    parent=b"p" * 32,
    tokens=pack_tokens(range(16)),
    generation=3,
)


def damaged(data: bytes, expected: Label = LABEL) -> str:
    with pytest.raises(BadEnvelope) as caught:
        unseal(data, expected)
    return caught.value.reason


@given(st.binary(max_size=300), st.integers(1, 9))
def test_what_is_sealed_comes_back(payload: bytes, ranges: int) -> None:
    sealed = seal(LABEL, payload, ranges)
    assert unseal(sealed, LABEL) == payload and len(sealed) == sealed_size(LABEL, len(payload), ranges)
    header = read_header(sealed[: len(sealed) - len(payload)])
    parts = [payload[slice(*header.span(i))] for i in range(ranges)]
    assert b"".join(parts) == payload
    for i, part in enumerate(parts):
        header.check_range(i, part)


def test_every_bit_is_under_a_sum() -> None:
    sealed = seal(LABEL, random.Random(0).randbytes(97), 3)
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged(bytes(flipped))


def test_every_truncation_and_every_tail_is_seen() -> None:
    sealed = seal(LABEL, b"x" * 50, 2)
    for length in range(len(sealed)):
        damaged(sealed[:length])
    assert damaged(sealed + b"\0") == "length"
    assert damaged(sealed + sealed) == "length"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("key", b"q" * 32, "key"),
        ("kind", "session", "kind"),
        ("namespace", "b", "namespace"),
        ("layout", "16x4", "layout"),
        ("layout", "32x2", "layout"),
        ("generation", 2, "generation"),
        ("generation", 4, "generation"),
        ("parent", b"r" * 32, "tokens"),
        ("tokens", pack_tokens(range(1, 17)), "tokens"),
    ],
)
def test_valid_bytes_of_something_else_are_refused(field: str, value: object, reason: str) -> None:
    other = msgspec.structs.replace(LABEL, **{field: value})
    assert damaged(seal(other, b"payload")) == reason


def test_lengths_in_a_header_are_not_believed() -> None:
    sealed = bytearray(seal(LABEL, b"x"))
    sealed[12:16] = (MAX_LABEL + 1).to_bytes(4, "little")
    assert damaged(bytes(sealed)) == "length"
    with pytest.raises(ValueError):
        seal(msgspec.structs.replace(LABEL, record=b"r" * (MAX_LABEL + 1)), b"")


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    damaged(data)
    damaged(b"NVSTATE\n" + data)
