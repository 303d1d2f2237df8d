"""A ModelRunner in a process of its own: frames of msgpack over its pipes, four bytes of length before each.

The first frame says which engine to build; each further one is an ExecBatch, answered by an ExecResult.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from nanovllm.engine.exec_batch import ExecBatch, ExecResult

ROOT = Path(__file__).resolve().parent.parent.parent


def write_frame(pipe: BinaryIO, content: Any) -> None:
    data = msgspec.msgpack.encode(content)
    pipe.write(struct.pack("<I", len(data)) + data)
    pipe.flush()


def read_frame(pipe: BinaryIO) -> Any:
    """The next frame, or None at the end."""
    head = pipe.read(4)
    return msgspec.msgpack.decode(pipe.read(struct.unpack("<I", head)[0])) if head else None


class ProcessRunner:
    """The parent's end: a `Runner` whose `launch` returns before the step is computed."""

    def __init__(self, **settings: Any) -> None:
        command = [sys.executable, "-m", "tests.engine.runner_process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        write_frame(self.process.stdin, settings)  # type: ignore[arg-type]

    def launch(self, batch: ExecBatch) -> None:
        write_frame(self.process.stdin, batch.to_wire())  # type: ignore[arg-type]

    def collect(self, handle: object) -> ExecResult:
        return ExecResult.from_wire(read_frame(self.process.stdout))  # type: ignore[arg-type]

    def close(self) -> int:
        """End the process; its exit status."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.stdout.close()  # type: ignore[union-attr]
        return self.process.wait(timeout=30)


def main() -> None:
    """The child's end."""
    import torch

    from nanovllm import LLM

    torch.set_num_threads(1)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with LLM(progress=False, **read_frame(requests)) as llm:
        while (wire := read_frame(requests)) is not None:
            write_frame(answers, llm.engine.runner.run(ExecBatch.from_wire(wire)).to_wire())


if __name__ == "__main__":
    main()
