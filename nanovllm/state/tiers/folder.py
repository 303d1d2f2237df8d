"""One directory of the disk tier: the few system calls that state is written with.

What it is: files by name inside a directory held by its descriptor. What it knows nothing about: what the
files mean. Tests put other folders in its place: one that forgets what was not synced, one that fails, one
that kills its process at a named point; so every call that matters for durability is a method here.

Invariants: no name leads out of the directory (one component, `O_NOFOLLOW`, a regular file or an error);
directories are 0700 and files 0600; short reads and writes are continued; every OSError becomes a TierError.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovllm.errors import TierError, TierFullError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Folder:
    """A directory. `role` names it in errors and kill points."""

    def __init__(self, path: Path, role: str, *, create: bool = True) -> None:
        self.path, self.role = path, role
        with io_errors(role, "open"):
            if create and not os.path.lexists(path):
                path.mkdir(mode=0o700)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def child(self, name: str, *, create: bool = True) -> Folder:
        """The directory `name` inside this one, of the same class; its role is its name."""
        is_new = create and not os.path.lexists(self.path / _checked(name))
        folder = type(self)(self.path / name, name, create=create)
        if is_new:
            self.sync_names()
        return folder

    def open(self, name: str, flags: int) -> int:
        """A descriptor of the regular file `name`. Raises TierError on anything else."""
        with io_errors(self.role, "open"):
            safe = flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(_checked(name), safe, 0o600, dir_fd=self._fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise TierError(f"{self.role}/{name} is no regular file.")
            return fd

    def create(self, name: str) -> int:
        """A new empty file, for reading and writing; it must not exist."""
        return self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """All of `data` at `offset`."""
        view = memoryview(data)
        with io_errors(self.role, "write"):
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""
        parts = []
        with io_errors(self.role, "read"):
            while length > 0 and (part := os.pread(fd, length, offset)):
                parts.append(part)
                length, offset = length - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_all(self, name: str) -> bytes | None:
        """A whole file; None where there is none."""
        try:
            fd = self.open(name, os.O_RDONLY)
        except TierError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        try:
            return self.read(fd, self.size(fd), 0)
        finally:
            os.close(fd)

    def size(self, fd: int) -> int:
        """Bytes of an open file."""
        with io_errors(self.role, "stat"):
            return os.fstat(fd).st_size

    def truncate(self, fd: int, length: int) -> None:
        """Cut the file."""
        with io_errors(self.role, "truncate"):
            os.ftruncate(fd, length)

    def sync(self, fd: int) -> None:
        """The file's contents survive a power loss from here on."""
        with io_errors(self.role, "sync"):
            os.fdatasync(fd)

    def sync_names(self) -> None:
        """The directory's entries (creations, renames, removals) survive a power loss from here on."""
        with io_errors(self.role, "sync"):
            os.fsync(self._fd)

    def rename(self, old: str, new: str) -> None:
        """Replace `new` by `old`, atomically."""
        with io_errors(self.role, "rename"):
            os.rename(_checked(old), _checked(new), src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """A missing file is no error."""
        with io_errors(self.role, "remove"):
            try:
                os.unlink(_checked(name), dir_fd=self._fd)
            except FileNotFoundError:
                return

    def names(self) -> list[str]:
        """The entries whose names could be ours, sorted."""
        with io_errors(self.role, "list"):
            return sorted(name for name in os.listdir(self._fd) if _NAME.fullmatch(name))

    def close(self) -> None:
        """A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def io_errors(role: str, action: str) -> Iterator[None]:
    """OSErrors inside become TierError, or TierFullError where there is no room."""
    try:
        yield
    except OSError as error:
        kind = TierFullError if error.errno in _FULL else TierError
        raise kind(f"Cannot {action} {role}: {error.strerror or error}.") from error


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise TierError(f"{name!r} is no file name of the state plane.")
    return name
