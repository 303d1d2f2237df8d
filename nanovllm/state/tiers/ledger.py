"""The ledger: which durable objects the disk tier holds, in SQLite.

What it is: one row per durable file with the label that stands in it, so that a start reads one database
instead of every file. What it knows nothing about: the files. Invariants: a row carries its own xxh3-128,
because SQLite does not sum its pages; `commit` returns after the write-ahead log is on the disk
(`synchronous=FULL`); after `clean` nothing of a removed row is in any of its files; a database that SQLite or a
sum finds damaged is set aside and built anew from the files, which say the same of themselves.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from nanovllm.errors import TierError, TierFullError

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "ledger.sqlite"
_TABLE = """CREATE TABLE IF NOT EXISTS held
    (key BLOB PRIMARY KEY, size INTEGER NOT NULL, label BLOB NOT NULL, sum BLOB NOT NULL) WITHOUT ROWID"""


@dataclass(frozen=True, slots=True)
class Row:
    """One durable file: its key, its size, and its label as msgpack."""

    key: bytes
    size: int
    label: bytes

    @property
    def sum(self) -> bytes:
        """Over all of the row."""
        return xxh3_128_digest(self.key + self.size.to_bytes(8, "little") + self.label)


class Ledger:
    """The rows, and the commits. Used by one thread at a time. Without a folder: no rows, and none are kept."""

    def __init__(self, folder: Path | None, *, read_only: bool = False) -> None:
        self.path = (folder or Path()) / FILE
        self._is_unclean = not read_only  # the log of whoever was killed may hold what was removed
        if self.path.is_symlink():
            raise TierError("The ledger is a symbolic link.")
        uri = f"{self.path.absolute().as_uri()}{'?mode=ro' if read_only else ''}" if folder else "file::memory:"
        with sqlite_errors():
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=2.0)
            try:
                if not read_only:
                    self.path.chmod(0o600)
                    self._db.execute("PRAGMA journal_mode=WAL")
                    self._db.execute("PRAGMA synchronous=FULL")
                    self._db.execute("PRAGMA secure_delete=ON")
                    self._db.execute(_TABLE)
                    self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # its pages have room from here on
            except sqlite3.Error:
                self._db.close()
                raise

    def rows(self) -> tuple[list[Row], int]:
        """All sound rows, and how many were damaged. Raises TierError where SQLite cannot read its file."""
        sound, damaged = [], 0
        with sqlite_errors():
            for key, size, label, stored in self._db.execute("SELECT key, size, label, sum FROM held"):
                try:
                    row = Row(bytes(key), int(size), bytes(label))
                    is_sound = row.sum == stored
                except (TypeError, ValueError, OverflowError):
                    is_sound = False
                if is_sound:
                    sound.append(row)
                else:
                    damaged += 1
        return sound, damaged

    def check(self) -> None:
        """Raises TierError unless SQLite finds its pages in order."""
        with sqlite_errors():
            answer = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if answer is None or answer[0] != "ok":
            raise TierError("The ledger is damaged.")

    def reset(self, rows: Iterable[Row]) -> None:
        """Begin anew with these rows: what cannot be read as a row goes."""
        with sqlite_errors():
            self._db.execute("DELETE FROM held")
        self.commit(put=rows)

    def commit(self, put: Iterable[Row] = (), remove: Iterable[bytes] = ()) -> None:
        """One transaction, on the disk when it returns. Raises TierError, TierFullError; then nothing changed."""
        gone = [(key,) for key in remove]
        with sqlite_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("DELETE FROM held WHERE key = ?", gone)
                rows = [(row.key, row.size, row.label, row.sum) for row in put]
                self._db.executemany("INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?)", rows)
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        self._is_unclean |= bool(gone)

    def clean(self) -> None:
        """What was removed, its name included, is in the log no more. Raises TierError where a reader is in the way."""
        if self._is_unclean:
            self.empty_log()

    def empty_log(self) -> None:
        """Bring its log into its file: that takes no room but for new pages, and gives back the log's."""
        with sqlite_errors():
            is_busy = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if is_busy:
            raise TierError("The ledger: somebody reads it, so its log cannot be emptied.")
        self._is_unclean = False

    def file_bytes(self) -> int:
        """What the database and its logs take."""
        files = [self.path, *(self.path.with_name(FILE + tail) for tail in ("-wal", "-shm"))]
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """A second call does nothing."""
        self._db.close()


@contextmanager
def sqlite_errors() -> Iterator[None]:
    """SQLite's errors become TierError, or TierFullError where the disk is full."""
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        raise (TierFullError if full else TierError)(f"The ledger: {error}.") from error
    except OSError as error:
        raise TierError(f"The ledger: {error.strerror}.") from error
