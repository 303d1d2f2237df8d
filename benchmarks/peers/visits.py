"""A visit: one engine started in a process of its own, the rows measured one after the other, the process ended.

What it knows nothing about: tables, ratios. Invariants: one visit at a time, so no engine ever shares the machine with
another; every wait is bounded; when a visit ends, so have all processes it started.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.engines import CAPS, WORKERS, Engine, Missing, last_lines
from peers.rows import Draw, Figures, Request, Result, Row, checked

START_S, RUN_S, STOP_S = 900.0, 1800.0, 60.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
FIRST_PROMPT = list(range(1000, 1016))


@dataclass(frozen=True)
class Place:
    """Where and how the engines run: the same for all of them."""

    folder: Path
    weights: Path
    gguf: Path | None
    threads: int
    max_model_len: int

    def settings(self, engine: Engine, is_capped: bool) -> dict[str, Any]:
        """What a worker is told."""
        model = self.gguf if engine.takes_gguf and self.gguf is not None else self.weights
        if model is self.weights and not engine.takes_safetensors:
            raise Missing(f"{engine.name} reads GGUF files only, and the model is none")
        return {
            "model": str(model),
            "dtype": "float32" if is_capped else "bfloat16",
            "threads": self.threads,
            "max_model_len": self.max_model_len,
            "first_prompt": FIRST_PROMPT,
            **engine.settings,
        }

    def environment(self, engine: Engine, is_capped: bool) -> dict[str, str]:
        """The worker's own variables on top of this process's."""
        cores = "0" if self.threads == 1 else f"0-{self.threads - 1}"
        own = {key: text.format(cores=cores, threads=self.threads) for key, text in engine.environment.items()}
        common = {**OFFLINE, "OMP_NUM_THREADS": str(self.threads)}
        return {**os.environ, **common, **own, **(CAPS if is_capped else {})}


class Worker:
    """The process, and lines of JSON to and from it. Raises Missing where it does not answer."""

    def __init__(self, engine: Engine, python: str, place: Place, is_capped: bool) -> None:
        self.engine, self.log = engine, place.folder / "logs" / f"{engine.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [python, str(WORKERS / engine.worker), json.dumps(place.settings(engine, is_capped))]
        begin_s = time.perf_counter()
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0, start_new_session=True,
                env=place.environment(engine, is_capped), cwd=WORKERS,
            )  # fmt: skip
        try:
            self._pending = b""
            self.about: dict[str, Any] = self._read(START_S)["about"]
        except BaseException:
            self.stop(0)
            raise
        self.start_s = time.perf_counter() - begin_s

    def send(self, requests: list[Request]) -> list[Result]:
        """Have the requests answered."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"requests": requests}).encode() + b"\n")
        except OSError as error:
            raise Missing(self._reason("went away")) from error
        answer = self._read(RUN_S)
        if "error" in answer:
            raise ValueError(answer["error"])
        return checked(requests, answer["results"])

    def stop(self, patience_s: float = STOP_S) -> None:
        """End the process, kindly for so long, and every process it started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line, however long it is."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise Missing(self._reason(f"gave no answer in {seconds:.0f} s"))
                data = os.read(self.process.stdout.fileno(), 2**20)
                if not data:
                    raise Missing(self._reason("ended"))
                self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def _reason(self, what: str) -> str:
        return f"{self.engine.name} {what}: {last_lines(self.log)}"


@contextmanager
def visit(engine: Engine, python: str, place: Place, is_capped: bool) -> Iterator[Worker]:
    """The worker while it lives."""
    worker = Worker(engine, python, place, is_capped)
    try:
        yield worker
    except BaseException:  # it died, or we are told to end: no time to be kind
        worker.stop(0)
        raise
    worker.stop()


def measure(worker: Worker, row: Row, repeat: int) -> Figures:
    """The figures of one row."""
    figures = row.measure(Draw(row.name, repeat), worker.send)
    return figures or {"seconds": worker.start_s}
