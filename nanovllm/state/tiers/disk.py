"""The disk tier: KV in segments without fsync, texts in durable files, one owner per folder.

    LOCK SCHEMA ledger.sqlite kv/*.seg texts/<key> quarantine/<key>.bad

What it is: the two ways of keeping bytes on a disk behind the tier protocol, their common bound, and the
quarantine, which keeps what was damaged for a week at most. What it knows nothing about: objects, policies.
Invariants: the files together stay within `size_bytes` (the quota that the store fills is 80 % of it: the rest is room
for dead frames and for rewriting them); a folder that was damaged opens with what is sound in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from nanovllm.errors import StateFolderError, TierError, TierFullError
from nanovllm.state.envelope import Label
from nanovllm.state.tiers.durable import DurableFiles
from nanovllm.state.tiers.folder import Folder, io_errors
from nanovllm.state.tiers.ledger import FILE, Ledger, Row
from nanovllm.state.tiers.ownership import Ownership
from nanovllm.state.tiers.segments import Segments
from nanovllm.state.tiers.tier import Found, Item, total_bytes

LIVE_SHARE = 0.8
MIN_SEGMENT, MAX_SEGMENT = 1 << 16, 256 << 20
QUARANTINE_BYTES, QUARANTINE_S = 64 << 20, 7 * 86_400  # the objects that it was of are often gone


class DiskTier:
    """A folder of sealed bytes that survives the process, and for durable items a power loss."""

    name = "disk"
    durable = True
    shared = False

    def __init__(
        self, path: Path, size_bytes: int, *, read_only: bool = False, folder_class: type[Folder] = Folder
    ) -> None:
        self.path, self.size_bytes, self.read_only = Path(path), size_bytes, read_only
        self.quota_bytes = int(size_bytes * LIVE_SHARE)
        self.warnings: list[str] = []
        self._owner = Ownership(self.path, read_only=read_only)
        try:
            self._open(folder_class)
        except TierError as error:
            self._owner.close()
            raise StateFolderError(f"The state folder {path} cannot be opened: {error.message}") from error

    @property
    def used_bytes(self) -> int:
        """Live frames and durable files."""
        return self.segments.live_bytes + self.files.file_bytes

    @property
    def file_bytes(self) -> int:
        """What the segments and durable files take on the disk; `du` of kv/ and texts/."""
        return self.segments.file_bytes + self.files.file_bytes

    def write(self, items: Sequence[Item]) -> None:
        """Durable items first, as one group. Raises TierFullError where the bound would be passed."""
        self._writable()
        durable = [item for item in items if item.durable]
        volatile = [item for item in items if not item.durable]
        self._make_room(total_bytes(items))
        if durable:
            self.files.write(durable)
        self.segments.append(volatile)

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Unverified."""
        return [self.files.read(key) if key in self.files else self.segments.read(key) for key in keys]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """By the index in memory."""
        return [key in self.files or key in self.segments for key in keys]

    def drop(self, keys: Sequence[bytes], *, scrub: bool = False) -> None:
        """Frames are marked, or zeroed; then durable ones go, for good when it returns.

        In this order: whoever is killed in between still has the text, and so the name under which all goes."""
        self._writable()
        self.segments.drop(keys, scrub=scrub)
        if scrub:
            self._forget_set_aside(keys)
        self.files.drop(keys)
        with suppress(TierError):  # the bytes are gone; room for a rewrite may come later
            self.segments.collect()

    def scan(self) -> Iterator[Found]:
        """Everything that survived."""
        if not self.read_only:
            with suppress(TierError):
                self._bound_quarantine()
        yield from self.files.recover(self._rows)
        counts = self.files.counts
        if counts.missing or counts.damaged:
            self.warnings.append(f"Texts were lost: {counts.missing} files are gone, {counts.damaged} are damaged.")
        yield from self.segments.recover()

    def quarantine(self, key: bytes, sealed: bytes | None) -> None:
        """Durable files are moved, frames copied and marked dead."""
        if self.read_only:
            return
        if key in self.files:
            self.files.set_aside(key, self._quarantine)
        else:
            self.segments.drop([key])
            if sealed is not None:
                self._keep_a_copy(key, sealed)
        self._bound_quarantine()

    def close(self) -> None:
        """A second call does nothing."""
        self.segments.close()
        self.files.close()
        for folder in (self.segments.folder, self.files.folder, self._quarantine, self._root):
            folder.close()
        self._owner.close()

    def _open(self, folder_class: type[Folder]) -> None:
        create = not self.read_only
        self._root = folder_class(self.path, "state", create=False)
        self._quarantine = self._root.child("quarantine", create=create)
        ledger = self._open_ledger()
        self.files = DurableFiles(self._root.child("texts", create=create), ledger, self.read_only)
        segment_bytes = min(max(self.size_bytes // 32, MIN_SEGMENT), MAX_SEGMENT)
        self.segments = Segments(self._root.child("kv", create=create), segment_bytes, self.read_only)

    def _open_ledger(self) -> Ledger:
        """The ledger and its sound rows; a damaged one is set aside and begun anew."""
        self._rows: list[Row] = []
        ledger = None
        try:
            ledger = Ledger(self.path, read_only=self.read_only)
            ledger.check()
            rows, damaged = ledger.rows()
            self._rows = [row for row in rows if _has_label(row)]
            if damaged and not self.read_only:
                ledger.reset(self._rows)
            if damaged:
                self.warnings.append(f"{damaged} rows of the ledger were damaged and are taken from their files.")
            return ledger
        except TierError as error:
            if ledger is not None:
                ledger.close()
            if self.read_only:  # its journal needs a file beside it, which a read-only file system does not take
                self.warnings.append(f"{error.message} The files are read without it.")
                return Ledger(None, read_only=True)
            self.warnings.append(f"{error.message} It is built anew from the files.")
        for tail in ("", "-wal", "-shm"):
            file = self.path / (FILE + tail)
            if file.exists():
                file.replace(self._quarantine.path / (FILE + tail + ".bad"))
        return Ledger(self.path)

    def _make_room(self, incoming: int) -> None:
        limit = self.size_bytes - self.segments.segment_bytes - self.files.file_bytes
        if self.segments.file_bytes + incoming > limit:
            self.segments.collect(incoming, limit)
        if self.segments.file_bytes + incoming > limit:
            raise TierFullError(f"The disk tier's {self.size_bytes:,} bytes are used up.")

    def _keep_a_copy(self, key: bytes, sealed: bytes) -> None:
        try:
            name = f"{key.hex()}.bad"
            self._quarantine.remove(name)
            fd = self._quarantine.create(name)
        except TierError:
            return  # the copy is for a person's eyes; the miss was counted already
        with open(fd, "wb") as file:
            file.write(sealed)

    def _forget_set_aside(self, keys: Sequence[bytes]) -> None:
        """What was damaged goes with its object, too."""
        mine = {f"{key.hex()}.bad" for key in keys} & set(self._quarantine.names())
        for name in mine:
            self._quarantine.remove(name)
        if mine:
            self._quarantine.sync_names()

    def _bound_quarantine(self) -> None:
        with io_errors("quarantine", "bound"):
            files = sorted(self._quarantine.path.iterdir(), key=lambda file: file.lstat().st_ctime_ns, reverse=True)
            total, oldest = 0, time.time() - QUARANTINE_S
            for file in files:
                total += file.lstat().st_size
                if total > QUARANTINE_BYTES or file.lstat().st_ctime < oldest:
                    file.unlink()

    def _writable(self) -> None:
        if self.read_only:
            raise TierError("The state folder is open read-only.")


def _has_label(row: Row) -> bool:
    try:
        return msgspec.msgpack.decode(row.label, type=Label).key == row.key
    except msgspec.DecodeError:
        return False
