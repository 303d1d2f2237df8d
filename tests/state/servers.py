"""A real Redis or Valkey server for tests, on a free port, gone with the test."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

BINARY = shutil.which("valkey-server") or shutil.which("redis-server")
AGAIN_S = 0.2  # Linux sends a lost TCP segment again after this at the earliest
needs_server = pytest.mark.skipif(BINARY is None, reason="needs valkey-server or redis-server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(url, process) of a server that keeps nothing on the disk."""
    port = free_port()
    command = [
        BINARY,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port, socket_timeout=2, retry=None)
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.AuthenticationError:  # it answers, if only to those with a password
                break
            except redis.RedisError:
                time.sleep(0.02)
        client.close()
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.kill()
        process.wait()


class Proxy:
    """A TCP proxy in front of a server, and what a network does: the answers are slow, stall, end early or never come.

    `bytes_back` counts what came back.
    """

    def __init__(self, url: str) -> None:
        self._target = int(url.rpartition(":")[2].partition("/")[0])
        self.bytes_back = 0
        self.delay_s = 0.0  # before each piece that comes back
        self.loss = 0.0  # the share of these that are lost first, and sent again after `AGAIN_S`
        self.is_parted = False  # what is sent goes nowhere, and nobody says so
        self.cut_after: int | None = None  # bytes back after which a connection ends
        self._rng = random.Random(11)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No more connections; those that are open end with their ends."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                try:
                    theirs = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    ours.close()
                    continue
                for pair in ((ours, theirs, False), (theirs, ours, True)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_back: bool) -> None:
        with contextlib.suppress(OSError), source, sink:
            back = 0
            while data := source.recv(1 << 16):
                if self.is_parted:
                    continue
                if is_back:
                    back += len(data)
                    self._hold_up(len(data))
                    if self.cut_after is not None and back > self.cut_after:
                        sink.shutdown(socket.SHUT_RDWR)
                        return
                sink.sendall(data)

    def _hold_up(self, size: int) -> None:
        self.bytes_back += size
        while self._rng.random() < self.loss:
            time.sleep(AGAIN_S)
        time.sleep(self.delay_s)
