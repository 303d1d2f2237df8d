"""Bundles: one object with its KV as bytes, for another folder or another machine.

    magic 8 | count u32 | count x (length u64 | envelope) | xxh3-128 of everything before

What it is: the verbs `export` and `import_`. What it knows nothing about: how objects are stored. Invariants:
a bundle is verified whole before anything of it is taken in, so that a damaged one leaves no trace; what
is taken in gets a new id; KV is taken only where its digests, layout and namespace are this plane's own,
and the rest is computed again. The sums find accidents, not forgers: import what you trust.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from xxhash import xxh3_128_digest

from nanovllm.errors import StateBundleError, StateNotFoundError
from nanovllm.state.envelope import SUM_BYTES, BadEnvelope, Label, read_header, seal, unseal
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.migration import BATCH, Migration
from nanovllm.state.naming import Naming
from nanovllm.state.objects import KVBlock, Metadata, StateId, StateObject
from nanovllm.state.payload import Payload, decode, object_of
from nanovllm.state.plane import Plane
from nanovllm.state.steps import Steps
from nanovllm.state.storing import payload_label

MAGIC = b"NVBUNDL1"
_COUNT, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")


@dataclass
class Bundles:
    """Out of this plane and into it."""

    plane: Plane
    naming: Naming
    migration: Migration

    def export(self, obj: StateObject) -> Steps[bytes]:
        """The object's payload and the KV of its longest known prefix."""
        started = self.plane.clock.now_ns()
        entry = self.plane.catalog.entries.get(obj.payload_key)
        data, _ = (None, "") if entry is None else (yield from self.plane.payload(entry))
        if data is None:
            raise StateNotFoundError(f"The bytes of {obj.label!r} are lost.")
        parts = [seal(payload_label(obj), data), *(yield from self._blocks(obj))]
        head = MAGIC + _COUNT.pack(len(parts)) + b"".join(_LENGTH.pack(len(part)) + part for part in parts)
        reason = f"its text and {len(parts) - 1} of {len(obj.chain)} blocks"
        self.plane.receipt("export", started, True, reason, obj=obj, size_bytes=len(head) + SUM_BYTES)
        return head + xxh3_128_digest(head)

    def import_(self, data: bytes, metadata: Metadata) -> Steps[StateId]:
        """Take a bundle in under `metadata`'s namespace and name. Raises StateBundleError; then nothing changed."""
        started = self.plane.clock.now_ns()
        record, payload, blocks = _read(data)
        given = Metadata(
            kind=record.kind,
            name=metadata.name or record.name,
            version=metadata.version if metadata.name else record.version,
            namespace=metadata.namespace,
            ttl=metadata.ttl or (None if record.ttl_ms is None else record.ttl_ms / 1000),
            durable=metadata.durable,
            kv_namespace=metadata.kv_namespace,
        )
        state_id = yield from self.naming.put(object_of(payload), given)
        obj = self.plane.catalog.objects[state_id]
        reason = yield from self._take(obj, blocks)
        state_id.receipt = self.plane.receipt(
            "import", started, True, reason, obj=obj, size_bytes=len(data), detail={"from": record.state_id}
        )
        return state_id

    def _blocks(self, obj: StateObject) -> Steps[list[bytes]]:
        """The chain's blocks, sealed, from whatever tier has them, until the first that none has."""
        blocks, device, parts = (yield from self.naming.blocks_of(obj)), self.plane.device, list[bytes]()
        for start in range(0, len(blocks), BATCH):
            batch = blocks[start : start + BATCH]
            found = {b.digest: None if device is None else device.read(b.digest) for b in batch}
            load = yield from self.migration.fetch([b for b in batch if found[b.digest] is None])
            found.update({block.digest: payload for block, payload in zip(load.blocks, load.payloads)})
            for block in batch:
                payload = found[block.digest]
                if payload is None:
                    return parts
                parts.append(self.plane.seal_block(self.migration.label_of(block), payload))
        return parts

    def _take(self, obj: StateObject, blocks: list[tuple[Label, bytes]]) -> Steps[str]:
        """Write those that are this object's own blocks here; what was taken, and why the others were not."""
        pairs = yield from self._own(obj, blocks)
        there = sum(block.digest in self.plane.catalog.entries for block, _ in pairs)
        is_there = obj.state_id in self.plane.catalog.objects  # it may have been dropped since
        transfer = self.migration.spill(pairs) if pairs and is_there else None
        if transfer is not None:
            yield transfer
        new = len(pairs) - there
        taken = new if transfer is not None and transfer.ok else 0
        foreign = len(blocks) - len(pairs)
        others = [
            f"{there} are here already" if there else "",
            f"{foreign} are of another model, layout or namespace" if foreign else "",
            f"for {new - taken} there is no room" if new > taken else "",
        ]
        told = "; ".join(filter(None, others))
        return f"text, and {taken} of {len(blocks)} blocks: {told}" if told else f"text and {taken} blocks"

    def _own(self, obj: StateObject, blocks: list[tuple[Label, bytes]]) -> Steps[list[tuple[KVBlock, bytes]]]:
        """Those that are this object's own blocks here, in order."""
        pairs: list[tuple[KVBlock, bytes]] = []
        size = None if self.plane.device is None else self.plane.device.block_bytes
        for own, (label, payload) in zip((yield from self.naming.blocks_of(obj)), blocks):
            if label.key != own.digest or label.layout != self.plane.layout or label.namespace != own.namespace:
                break
            if size not in (None, len(payload)):
                break
            pairs.append((own, payload))
        return pairs


def _read(data: bytes) -> tuple[StateObject, Payload, list[tuple[Label, bytes]]]:
    """Everything in a bundle, verified. Raises StateBundleError."""
    if len(data) < len(MAGIC) + _COUNT.size + SUM_BYTES or data[: len(MAGIC)] != MAGIC:
        raise StateBundleError("This is no exported state.", hint="Give a file that `nanovllm state export` wrote.")
    body = data[:-SUM_BYTES]
    if xxh3_128_digest(body) != data[-SUM_BYTES:]:
        raise StateBundleError("The exported state is damaged or cut off.", hint="Export it again.")
    try:
        parts = [(read_header(part).label, unseal(part)) for part in _parts(body)]
        record = msgspec.msgpack.decode(parts[0][0].record, type=StateObject)
        payload = decode(parts[0][1])
    except (BadEnvelope, struct.error, msgspec.DecodeError, IndexError) as error:
        raise StateBundleError("The exported state is of another version.", hint="Export it with this one.") from error
    if record.kind not in KIND_TABLE:
        raise StateBundleError(f"The exported state is of an unknown kind {record.kind!r:.60}.")
    return record, payload, parts[1:]


def _parts(body: bytes) -> Iterator[bytes]:
    """The envelopes; a length that leads out of the bundle is a BadEnvelope."""
    (count,) = _COUNT.unpack_from(body, len(MAGIC))
    at = len(MAGIC) + _COUNT.size
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        if at + length > len(body):
            raise BadEnvelope("length")
        yield body[at : at + length]
        at += length
    if at != len(body):
        raise BadEnvelope("length")
