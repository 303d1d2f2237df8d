"""Durable files: sealed bytes that are on the disk before anybody is told so.

    write `<key>.new` -> fdatasync -> rename to `<key>` -> fsync of the directory -> commit of the ledger

What it is: one file per key, named by the key in hex, with group commit: a batch shares the directory's
sync and the ledger's commit. What it knows nothing about: objects, names, which thread calls.

Invariants: when `write` returns, a power loss loses none of the batch; when `drop` returns, none of it
comes back. A file says of itself what the ledger says of it, so a lost or damaged ledger loses nothing: a
sound file without a row is taken in again. After `recover` there is no half-written file left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from nanovllm.errors import TierError
from nanovllm.state.envelope import BadEnvelope, Label, read_header
from nanovllm.state.tiers.folder import Folder, io_errors
from nanovllm.state.tiers.ledger import Ledger, Row
from nanovllm.state.tiers.tier import Found, Item

NEW = ".new"
HEAD_BYTES = 1 << 16


@dataclass
class DurableCounts:
    """What recovery found."""

    missing: int = 0  # rows without a file
    damaged: int = 0  # files that do not verify


@dataclass
class DurableFiles:
    """The durable part of one disk tier."""

    folder: Folder
    ledger: Ledger
    read_only: bool = False
    counts: DurableCounts = field(default_factory=DurableCounts)

    def __post_init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self.file_bytes = 0  # what the files take; read by other threads

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def write(self, items: Sequence[Item]) -> None:
        """Group commit: all or none of the batch. Raises TierError, TierFullError."""
        try:
            self._write_new(items)
            for item in items:
                self.folder.rename(item.key.hex() + NEW, item.key.hex())
            self.folder.sync_names()
            self.ledger.commit(put=[_row_of(item) for item in items])
        except TierError:
            self._take_back(items)
            raise
        for item in items:
            self._enter(item.key, len(item.sealed))

    def read(self, key: bytes) -> bytes | None:
        """The sealed bytes, unverified."""
        return self.folder.read_all(key.hex()) if key in self._sizes else None

    def drop(self, keys: Sequence[bytes]) -> None:
        """Gone for good when it returns."""
        here = [key for key in dict.fromkeys(keys) if key in self._sizes]
        if here:
            self._erase(here)
        self.ledger.clean()

    def set_aside(self, key: bytes, elsewhere: Folder) -> None:
        """Move a damaged file out of the way and forget it."""
        self.ledger.commit(remove=[key])
        self._leave(key)
        with io_errors(self.folder.role, "set aside"):
            os.rename(self.folder.path / key.hex(), elsewhere.path / f"{key.hex()}.bad")
        self.folder.sync_names()

    def recover(self, rows: Sequence[Row]) -> Iterator[Found]:
        """Bring ledger and files together; yields what is held."""
        names = set(self.folder.names())
        known = {row.key: row for row in rows}
        lost = [key for key in known if key.hex() not in names]
        self.counts.missing += len(lost)
        strangers = [name for name in names if not name.endswith(NEW) and _key_of(name) not in known]
        adopted = [row for row in map(self._adopt, sorted(strangers)) if row is not None]
        if not self.read_only:
            self._remove_half_written(names)
            if lost or adopted:
                self.ledger.commit(put=adopted, remove=lost)
        for row in [*(row for key, row in known.items() if key not in set(lost)), *adopted]:
            self._enter(row.key, row.size)
            yield Found(msgspec.msgpack.decode(row.label, type=Label), row.size, durable=True)

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def _erase(self, keys: Sequence[bytes]) -> None:
        """Rows, then files. Where the ledger finds no room, the files go first: their room may be what it lacks."""
        try:
            self.ledger.commit(remove=keys)
        except TierError:
            self._remove_files(keys)
            with suppress(TierError):
                self.ledger.empty_log()
            self.ledger.commit(remove=keys)
        else:
            self._remove_files(keys)
        for key in keys:
            del self._sizes[key]

    def _remove_files(self, keys: Sequence[bytes]) -> None:
        """Off the disk when it returns; the keys stay known, for another try, until their rows are gone, too."""
        for key in keys:
            self.folder.remove(key.hex())
        self.folder.sync_names()
        for key in keys:
            self._enter(key, 0)

    def _write_new(self, items: Sequence[Item]) -> None:
        """All are written before the first is synced, so that the file system can share its own commit."""
        fds: list[int] = []
        try:
            for item in items:
                self.folder.remove(item.key.hex() + NEW)
                fds.append(self.folder.create(item.key.hex() + NEW))
                self.folder.write(fds[-1], item.sealed, 0)
            for fd in fds:
                self.folder.sync(fd)
        finally:
            for fd in fds:
                os.close(fd)

    def _enter(self, key: bytes, size: int) -> None:
        self.file_bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _leave(self, key: bytes) -> None:
        self.file_bytes -= self._sizes.pop(key, 0)

    def _take_back(self, items: Sequence[Item]) -> None:
        """After a failure nothing of the batch stays, as far as the disk still obeys; recovery does the rest."""
        try:
            for item in items:
                self.folder.remove(item.key.hex() + NEW)
                if item.key not in self._sizes:
                    self.folder.remove(item.key.hex())
        except TierError:
            return

    def _remove_half_written(self, names: set[str]) -> None:
        for name in sorted(name for name in names if name.endswith(NEW)):
            self.folder.remove(name)

    def _adopt(self, name: str) -> Row | None:
        """The row of a file that the ledger does not know; None where its head does not verify."""
        try:
            fd = self.folder.open(name, os.O_RDONLY)
        except TierError:
            self.counts.damaged += 1
            return None
        try:
            size = self.folder.size(fd)
            header = _read_head(self.folder, fd, size)
            if header is None or header.key.hex() != name:
                self.counts.damaged += 1
                return None
            return Row(header.key, size, msgspec.msgpack.encode(header))
        finally:
            os.close(fd)


def _read_head(folder: Folder, fd: int, size: int) -> Label | None:
    for length in (HEAD_BYTES, size):
        try:
            header = read_header(folder.read(fd, length, 0))
        except BadEnvelope:
            continue
        return header.label if size == header.payload_offset + header.payload_length else None
    return None


def _row_of(item: Item) -> Row:
    return Row(item.key, len(item.sealed), msgspec.msgpack.encode(read_header(item.sealed).label))


def _key_of(name: str) -> bytes:
    try:
        return bytes.fromhex(name)
    except ValueError:
        return b""
