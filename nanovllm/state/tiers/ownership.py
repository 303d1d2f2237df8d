"""Who owns a state folder: one process, told by a lock; and which schema the folder has.

What it is: the lock file, the schema file, and the address at which the owner answers. What it knows nothing
about: what else lies in the folder.
Invariants: the lock is the kernel's (`flock`), so that it ends with its process, however that ends; a
folder that is refused, foreign or of another schema, is left as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from nanovllm.errors import StateFolderError

SCHEMA = 1
LOCK_FILE, SCHEMA_FILE, ADDRESS_FILE = "LOCK", "SCHEMA", "LOCK.address"
MAX_ADDRESS = 300


class Ownership:
    """Held from construction to `close`. `read_only` looks in without owning, beside an owner if need be."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._fd = -1
        try:
            has_schema = path.exists() and _has_schema(path, read_only)  # asked before anything is changed
            if read_only and not has_schema:
                raise StateFolderError(f"{path} is no state folder.", hint="Name the folder given to --state-dir.")
            if not read_only:
                self._fd = self._take(path)
        except OSError as error:
            self.close()
            raise StateFolderError(
                f"The state folder {path} cannot be opened: {error.strerror}.",
                hint="Name a folder that this user may write, on a disk that is not read-only.",
            ) from error
        except StateFolderError:
            self.close()
            raise

    def _take(self, path: Path) -> int:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        _sync_names(path.parent)
        fd = self._lock(path)
        try:
            if not _has_schema(path, read_only=False):  # another may have come between
                _write_synced(path / SCHEMA_FILE, f"{SCHEMA}\n".encode())
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _lock(self, path: Path) -> int:
        fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 64, 0)
            os.close(fd)
            raise _in_use(path, holder) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        (path / ADDRESS_FILE).unlink(missing_ok=True)  # the last owner's
        return fd

    def close(self) -> None:
        """Let the next one in; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_state_folder(path: Path) -> bool:
    """Whether somebody made one there."""
    return (path / SCHEMA_FILE).is_file()


def is_owned(path: Path) -> bool:
    """Whether a process has the folder now. Raises StateFolderError where that cannot be found out."""
    try:
        fd = os.open(path / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StateFolderError(f"The state folder {path} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def check_takeable(path: Path) -> None:
    """Before much work is done for it: whether the folder could be taken now. Changes nothing.

    Raises StateFolderError where it is foreign, of another schema or in use.
    """
    with contextlib.suppress(OSError):  # whoever takes it will tell
        if path.is_dir() and _has_schema(path, read_only=False) and is_owned(path):
            raise _in_use(path, (path / LOCK_FILE).read_bytes()[:64])


def note_address(path: Path, url: str) -> None:
    """Owner: write down where it answers. Without the note, others must be told; that is no reason to fail."""
    with contextlib.suppress(OSError):
        fd = os.open(path / ADDRESS_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(url)


def address_of(path: Path) -> str | None:
    """Where the owner answers, if it wrote that down; of a folder without an owner it says nothing."""
    try:
        fd = os.open(path / ADDRESS_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, encoding="utf-8", errors="replace") as file:
        return file.read(MAX_ADDRESS).strip() or None


def _in_use(path: Path, holder: bytes) -> StateFolderError:
    process = holder.decode(errors="replace").strip() or "unknown"
    return StateFolderError(
        f"The state folder {path} is in use by process {process}.",
        hint="Stop it, ask it over HTTP, or open the folder read-only.",
    )


def _has_schema(path: Path, read_only: bool) -> bool:
    """Whether it is one of ours; else it is empty. Raises StateFolderError where it is foreign or of another schema."""
    file = path / SCHEMA_FILE
    if not file.exists():
        foreign = [name for name in os.listdir(path) if not name.startswith(LOCK_FILE)]
        if foreign and not read_only:
            raise StateFolderError(f"{path} is no state folder and not empty.", hint="Name an empty or new folder.")
        return False
    text = file.read_bytes()[:32].decode(errors="replace").strip()
    if text != str(SCHEMA):
        raise StateFolderError(
            f"The state folder {path} has schema {text!r}; this version reads {SCHEMA}.",
            hint="Use the version that wrote it, or another folder.",
        )
    return True


def _write_synced(file: Path, data: bytes) -> None:
    temporary = file.with_name(f"{LOCK_FILE}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, file)
    _sync_names(file.parent)


def _sync_names(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
