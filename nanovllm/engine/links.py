"""Links: how messages reach an engine that runs beside the event loop, and come back.

What it is: a thread, or a child process at the end of a socket pair; both run the same
`EngineLoop` and carry the same messages. What it knows nothing about: requests, HTTP.
Invariants: messages arrive in order, on the event loop that opened the link; when the
other side is gone, `on_end` is called, once; `kill` leaves no process.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.engine.messages import LENGTH_BYTES, FromEngine, Stop, ToEngine, frame, frame_length

if TYPE_CHECKING:  # it brings torch
    from nanovllm.engine.engine_loop import EngineLoop, Inbox

logger = logging.getLogger("nanovllm")

OnMessage = Callable[[FromEngine], None]
OnEnd = Callable[[], None]
CHILD_MODULE = "nanovllm.engine.engine_process"


class Link(Protocol):
    """An engine beside the event loop."""

    can_restart: bool

    async def open(self, config: EngineConfig, on_message: OnMessage, on_end: OnEnd) -> None:
        """Start the engine; `Ready` or `Died` follows. `on_end` is called when the engine is gone."""
        ...

    def send(self, message: ToEngine) -> None:
        """Hand a message over; returns at once."""
        ...

    async def close(self, timeout_s: float) -> bool:
        """Stop the engine and wait for its end; False if it did not come in time."""
        ...

    def kill(self) -> None:
        """Leave nothing behind, without waiting."""
        ...


class ThreadLink:
    """The engine in a thread of this process. Its kernels release the GIL while they compute."""

    can_restart = False

    def __init__(self) -> None:
        self._inbox: Inbox = queue.SimpleQueue()
        self._ended = asyncio.Event()
        self._thread: threading.Thread | None = None
        self.engine_loop: EngineLoop | None = None  # for tests, which look into the engine between two steps

    async def open(self, config: EngineConfig, on_message: OnMessage, on_end: OnEnd) -> None:
        from nanovllm.engine.engine_process import serve_engine  # torch is imported in the thread that needs it

        loop = asyncio.get_running_loop()

        def send(message: FromEngine) -> None:
            loop.call_soon_threadsafe(on_message, message)

        def work() -> None:
            try:
                serve_engine(config, self._inbox, send, partial(setattr, self, "engine_loop"))
            except RuntimeError as error:  # the event loop closed first: nobody is left to tell
                logger.debug("The engine's thread ends: %s", error)
            finally:
                _tell(loop, self._ended.set)
                _tell(loop, on_end)

        self._thread = threading.Thread(target=work, name="nanovllm-engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    async def close(self, timeout_s: float) -> bool:
        self._inbox.put(Stop())
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        self._inbox.put(Stop())  # a daemon thread ends with the process


class ProcessLink:
    """The engine in a child process; frames of msgpack over a socket pair."""

    can_restart = True

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self, config: EngineConfig, on_message: OnMessage, on_end: OnEnd) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", CHILD_MODULE, str(theirs.fileno())]
        with theirs:
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(_bytes_of_config(config))
        self._reading = asyncio.create_task(self._read(reader, on_message, on_end))

    def send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    async def close(self, timeout_s: float) -> bool:
        self.send(Stop())
        if self._reading is None or self._child is None:
            return True
        try:
            await asyncio.wait_for(asyncio.shield(self._reading), timeout_s)
            await asyncio.to_thread(self._child.wait, timeout_s)
        except (TimeoutError, subprocess.TimeoutExpired):
            return False
        return True

    def kill(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._child is None else self._child.pid

    async def _read(self, reader: asyncio.StreamReader, on_message: OnMessage, on_end: OnEnd) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        try:
            while True:
                length = frame_length(await reader.readexactly(LENGTH_BYTES))
                on_message(decoder.decode(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError) as error:
            logger.debug("The engine's process closed the pipe: %s", error)
        except (ValueError, msgspec.MsgspecError):
            logger.exception("The engine's process sent what is no message.")
        finally:
            if self._writer is not None:
                self._writer.close()
            self.kill()
            on_end()


def _bytes_of_config(config: EngineConfig) -> bytes:
    data = msgspec.msgpack.encode(config)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # closed already
        return
