"""The envelope: what stored bytes are wrapped in, so that they are the right bytes or a miss.

    magic 8 | version u16 | ranges u16 | label length u32 | payload length u64     24 bytes
    label       msgpack: whose bytes these are (`Label`)
    sums        one xxh3-128 per range of the payload, 16 bytes each; KV has one range per few layers
    header sum  xxh3-128 of everything above
    payload

What it is: sealing and opening. What it knows nothing about: where the bytes lie. Every bit is under a
sum; a label that is not the expected one (another key, namespace, layout, generation, parent or tokens)
is refused like a torn one. The sums find accidents, not forgers: whoever can write the folder can seal
anew, which is why the remote tier may add a keyed MAC.

Invariants: `unseal(seal(label, payload), expected)` is the payload, or raises BadEnvelope with a reason;
it never returns other bytes. Nothing is read beyond the lengths that the header sum covers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from xxhash import xxh3_128_digest

MAGIC = b"NVSTATE\n"
VERSION = 1
MAX_LABEL = 1 << 20
MAX_RANGES = 1024
SUM_BYTES = 16
_HEAD = struct.Struct("<8sHHIQ")


class Label(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Whose bytes these are. `tokens`: the block's ids as little-endian int32; `record`: the object, for texts."""

    key: bytes
    kind: str
    namespace: str
    layout: str = ""
    generation: int = 0
    parent: bytes = b""
    tokens: bytes = b""
    cost_ms: float = 0.0
    record: bytes = b""


class BadEnvelope(Exception):
    """These are not the bytes that were asked for. `reason` is one word for the counters."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Header:
    """The verified head of an envelope."""

    label: Label
    sums: tuple[bytes, ...]
    payload_offset: int
    payload_length: int

    def span(self, i: int) -> tuple[int, int]:
        """Where range `i` lies within the payload: [start, end). Ranges differ by at most one byte."""
        count = len(self.sums)
        return self.payload_length * i // count, self.payload_length * (i + 1) // count

    def check_range(self, i: int, data: bytes | memoryview) -> None:
        """Verify one range that came alone, as in layer-wise streaming. Raises BadEnvelope."""
        if xxh3_128_digest(data) != self.sums[i]:
            raise BadEnvelope("checksum")


def seal(label: Label, payload: bytes, ranges: int = 1) -> bytes:
    """The envelope around `payload`. Raises ValueError on a label or a range count beyond the format's limits."""
    encoded = msgspec.msgpack.encode(label)
    if len(encoded) > MAX_LABEL or not 1 <= ranges <= MAX_RANGES:
        raise ValueError(f"a label of {len(encoded)} bytes, {ranges} ranges")
    view, size = memoryview(payload), len(payload)
    sums = b"".join(xxh3_128_digest(view[size * i // ranges : size * (i + 1) // ranges]) for i in range(ranges))
    head = _HEAD.pack(MAGIC, VERSION, ranges, len(encoded), size) + encoded + sums
    return head + xxh3_128_digest(head) + payload


def sealed_size(label: Label, payload_length: int, ranges: int = 1) -> int:
    """Bytes of the envelope without making it."""
    return _HEAD.size + len(msgspec.msgpack.encode(label)) + SUM_BYTES * (ranges + 1) + payload_length


def read_header(data: bytes | memoryview) -> Header:
    """The head of an envelope from its first bytes; `data` may end before the payload. Raises BadEnvelope."""
    if len(data) < _HEAD.size:
        raise BadEnvelope("truncated")
    magic, version, ranges, label_length, payload_length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise BadEnvelope("magic")
    if version != VERSION:
        raise BadEnvelope("version")
    if label_length > MAX_LABEL or not 1 <= ranges <= MAX_RANGES:
        raise BadEnvelope("length")
    sums_at = _HEAD.size + label_length
    sum_at = sums_at + SUM_BYTES * ranges
    if len(data) < sum_at + SUM_BYTES:
        raise BadEnvelope("truncated")
    if xxh3_128_digest(data[:sum_at]) != bytes(data[sum_at : sum_at + SUM_BYTES]):
        raise BadEnvelope("header")
    sums = tuple(bytes(data[sums_at + SUM_BYTES * i : sums_at + SUM_BYTES * (i + 1)]) for i in range(ranges))
    return Header(_label(bytes(data[_HEAD.size : sums_at])), sums, sum_at + SUM_BYTES, payload_length)


def unseal(sealed: bytes, expected: Label | None = None) -> bytes:
    """The payload, every range verified and the label as expected. Raises BadEnvelope."""
    header = read_header(sealed)
    if expected is not None:
        check_label(header.label, expected)
    if len(sealed) != header.payload_offset + header.payload_length:
        raise BadEnvelope("length")
    payload = memoryview(sealed)[header.payload_offset :]
    for i in range(len(header.sums)):
        start, end = header.span(i)
        header.check_range(i, payload[start:end])
    return bytes(payload)


def check_label(found: Label, expected: Label) -> None:
    """Raises BadEnvelope naming the first thing that differs; `tokens` only where the reader knows them."""
    for name in ("key", "kind", "namespace", "layout", "generation"):
        if getattr(found, name) != getattr(expected, name):
            raise BadEnvelope(name)
    if expected.tokens and (found.tokens != expected.tokens or found.parent != expected.parent):
        raise BadEnvelope("tokens")


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as they stand in a label."""
    return struct.pack(f"<{len(token_ids)}i", *token_ids)


def _label(encoded: bytes) -> Label:
    try:
        return msgspec.msgpack.decode(encoded, type=Label)
    except msgspec.DecodeError as error:
        raise BadEnvelope("label") from error
