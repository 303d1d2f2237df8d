"""A real Redis or Valkey server for tests, on a free port, gone with the test."""

from __future__ import annotations

import contextlib
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
    """A TCP proxy in front of a server: `delay_s` for each piece that comes back, and how many bytes that were."""

    def __init__(self, url: str) -> None:
        self._target = int(url.rpartition(":")[2].partition("/")[0])
        self.delay_s, self.bytes_back = 0.0, 0
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
            while data := source.recv(1 << 16):
                if is_back:
                    self.bytes_back += len(data)
                    time.sleep(self.delay_s)
                sink.sendall(data)
