"""Folders for the disk tier that misbehave: they forget what was not synced, fail, or are killed at a named point."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from nanovllm.state.tiers.folder import Folder, io_errors

PAGE = 512


class PowerLoss:
    """What a disk would still know: contents as of their last sync, names as of their directory's."""

    def __init__(self) -> None:
        self.contents: dict[int, bytes] = {}  # inode -> synced bytes
        self.names: dict[Path, dict[str, int]] = {}  # directory -> synced entries

    def folder_class(self) -> type[Folder]:
        """A Folder that tells this object what was synced."""
        power = self

        class Watched(Folder):
            def create(self, name: str) -> int:
                fd = super().create(name)
                power.contents[os.fstat(fd).st_ino] = b""
                return fd

            def sync(self, fd: int) -> None:
                super().sync(fd)
                power.contents[os.fstat(fd).st_ino] = os.pread(fd, os.fstat(fd).st_size, 0)

            def sync_names(self) -> None:
                super().sync_names()
                entries = {entry.name: entry.lstat().st_ino for entry in self.path.iterdir()}
                power.names[self.path] = entries

        return Watched

    def write_back(self, folder: Path) -> None:
        """What the kernel does on its own from time to time, of files that nobody synced."""
        files = [file for file in folder.iterdir() if file.is_file()]
        self.contents |= {file.lstat().st_ino: file.read_bytes() for file in files}
        self.names[folder] = {file.name: file.lstat().st_ino for file in files}

    def strike(self, path: Path, after: Path, rng: random.Random | None, *, keep_ledger: bool) -> None:
        """Make `after` the folder as the disk would hold it. Without `rng` nothing unsynced survives; with it, some."""
        after.mkdir(mode=0o700)
        for file in path.iterdir():
            if file.is_file() and (keep_ledger or not file.name.startswith("ledger")):
                shutil.copy2(file, after / file.name)
        for sub in (entry for entry in path.iterdir() if entry.is_dir()):
            if sub.name not in self.names.get(path, {}):
                continue
            (after / sub.name).mkdir(mode=0o700)
            for name, inode in self._entries(sub, rng).items():
                (after / sub.name / name).write_bytes(self._content(sub, name, inode, rng))

    def _entries(self, sub: Path, rng: random.Random | None) -> dict[str, int]:
        synced = self.names.get(sub, {})
        if rng is None:
            return dict(synced)
        now = {entry.name: entry.lstat().st_ino for entry in sub.iterdir()}
        both = {}
        for name in {*synced, *now}:
            inode = rng.choice((synced.get(name), now.get(name)))
            if inode is not None:
                both[name] = inode
        return both

    def _content(self, sub: Path, name: str, inode: int, rng: random.Random | None) -> bytes:
        synced = self.contents.get(inode, b"")
        current = next((file.read_bytes() for file in sub.iterdir() if file.lstat().st_ino == inode), synced)
        if rng is None or current == synced:
            return synced
        pages = [current[i : i + PAGE] for i in range(0, len(current), PAGE)]
        old = [synced[i : i + PAGE].ljust(len(page), b"\0") for i, page in zip(range(0, len(current), PAGE), pages)]
        mixed = b"".join(rng.choice(pair) for pair in zip(pages, old))
        return mixed[: rng.choice((len(mixed), len(synced), rng.randint(0, len(mixed))))]


def failing(fails: Callable[[str, str], int | None]) -> type[Folder]:
    """A Folder that raises the errno which `fails(role, action)` answers; 0 means a short write."""

    class Failing(Folder):
        def _maybe(self, action: str) -> None:
            code = fails(self.role, action)
            if code:
                with io_errors(self.role, action):
                    raise OSError(code, os.strerror(code))

        def create(self, name: str) -> int:
            self._maybe("create")
            return super().create(name)

        def write(self, fd: int, data: bytes, offset: int) -> None:
            code = fails(self.role, "write")
            if code is not None:
                super().write(fd, data[: len(data) // 2], offset)  # half of it came through
                with io_errors(self.role, "write"):
                    raise OSError(code or errno.EIO, os.strerror(code or errno.EIO))
            super().write(fd, data, offset)

        def read(self, fd: int, length: int, offset: int) -> bytes:
            code = fails(self.role, "read")
            if code == 0:
                return super().read(fd, length // 2, offset)
            if code:
                with io_errors(self.role, "read"):
                    raise OSError(code, os.strerror(code))
            return super().read(fd, length, offset)

        def sync(self, fd: int) -> None:
            self._maybe("sync")
            super().sync(fd)

        def rename(self, old: str, new: str) -> None:
            self._maybe("rename")
            super().rename(old, new)

        def sync_names(self) -> None:
            self._maybe("sync_names")
            super().sync_names()

        def remove(self, name: str) -> None:
            self._maybe("remove")
            super().remove(name)

    return Failing


KILLED_CALLS = (
    *(f"texts.{call}" for call in ("create", "write", "sync", "rename", "sync_names", "remove")),
    *(f"kv.{call}" for call in ("create", "write", "sync", "remove")),
    "ledger.commit",
)
KILL_POINTS = (*(f"{call}:{side}" for call in KILLED_CALLS for side in "01"), "texts.write:half", "kv.write:half")


def killing(point: str, after_hits: int, is_armed: Callable[[], bool] = lambda: True) -> type[Folder]:
    """A Folder whose process dies by SIGKILL at the `after_hits`-th time `point` is reached while it is armed."""
    left = [after_hits]

    def reach(name: str) -> None:
        if name == point and is_armed():
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    class Killing(Folder):
        def write(self, fd: int, data: bytes, offset: int) -> None:
            reach(f"{self.role}.write:0")
            if point.endswith("write:half") and point.startswith(self.role):
                super().write(fd, data[: len(data) // 2], offset)
                reach(point)
            super().write(fd, data, offset)
            reach(f"{self.role}.write:1")

    def around(action: str) -> Callable[..., object]:
        def call(self: Folder, *args: object) -> object:
            reach(f"{self.role}.{action}:0")
            done = getattr(Folder, action)(self, *args)
            reach(f"{self.role}.{action}:1")
            return done

        return call

    for action in ("create", "sync", "rename", "sync_names", "remove"):
        setattr(Killing, action, around(action))
    Killing.reach = staticmethod(reach)
    return Killing
