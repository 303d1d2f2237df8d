"""Where an engine runs when it does not run in its caller's thread.

What it is: `serve_engine`, the body of the engine's thread, and the child process that
runs the same body at the end of a socket. What it knows nothing about: event loops,
HTTP. Invariant: it ends when it is told to, and when the other side is gone.

    python -m nanovllm.engine.engine_process FD     started by links.ProcessLink alone
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.engine.build import build_engine
from nanovllm.engine.engine_loop import EngineLoop, Inbox, Send
from nanovllm.engine.messages import (
    LENGTH_BYTES,
    Died,
    ErrorInfo,
    FromEngine,
    Ready,
    Stop,
    ToEngine,
    frame,
    frame_length,
)
from nanovllm.errors import NanoVLLMError, UnhealthyError

logger = logging.getLogger("nanovllm")

ORPHAN_S = 5.0  # how long a child whose parent is gone may take to end by itself


def serve_engine(
    config: EngineConfig, inbox: Inbox, send: Send, on_built: Callable[[EngineLoop], None] | None = None
) -> None:
    """Build the engine, say `Ready`, run its loop to the end. What fails is said as `Died`."""
    try:
        loop = EngineLoop(build_engine(config), inbox, send)
        if on_built is not None:
            on_built(loop)
        send(Ready(loop.info(config)))
        loop.run()
    except NanoVLLMError as error:
        send(Died(ErrorInfo.of(error)))
    except Exception as error:
        logger.exception("The engine ended.")
        send(Died(ErrorInfo.of(UnhealthyError(f"The engine ended: {type(error).__name__}.", hint="See the log."))))


def main() -> None:
    """The child: its configuration first, then messages, until `Stop` or the end of the stream."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    inbox: Inbox = queue.SimpleQueue()
    with socket.socket(fileno=int(sys.argv[1])) as pipe:
        config = EngineConfig(**msgspec.msgpack.decode(_read_frame(pipe)))
        threading.Thread(target=_read_messages, args=(pipe, inbox), daemon=True).start()

        def send(message: FromEngine) -> None:
            try:
                pipe.sendall(frame(message))
            except OSError:  # nobody reads: the reading thread has seen it too, and says Stop
                return

        serve_engine(config, inbox, send)


def _read_messages(pipe: socket.socket, inbox: Inbox) -> None:
    """Put what comes into the inbox. The end of the stream is a `Stop`, and a hard one if a step does not end."""
    decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
    try:
        while True:
            inbox.put(decoder.decode(_read_frame(pipe)))
    except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
        logger.debug("The pipe has ended: %s", error)
    inbox.put(Stop())
    time.sleep(ORPHAN_S)
    os._exit(1)


def _read_frame(pipe: socket.socket) -> bytes:
    return _read_exactly(pipe, frame_length(_read_exactly(pipe, LENGTH_BYTES)))


def _read_exactly(pipe: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = pipe.recv(count - len(data))
        if not piece:
            raise EOFError("the other side is gone")
        data += piece
    return bytes(data)


if __name__ == "__main__":
    main()
