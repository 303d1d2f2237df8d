"""An engine that makes tokens at once, or misbehaves as the first token of a prompt says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / "workers"))

from worker_loop import Asked, Run, serve

DIE, SHORT, RAISE, SPAWN = 1, 2, 3, 4


class Worker:
    def __init__(self, settings: dict[str, Any]) -> None:
        print("a peer that talks on stdout")
        self.settings = settings
        self.child: int | None = None
        if settings.get("refuses"):
            raise SystemExit("this processor will not do")

    def run(self, asked: list[Asked]) -> None:
        what = asked[0].ids[0]
        if what == DIE:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if what == RAISE:
            raise RuntimeError("no room for the prompt")
        if what == SPAWN:
            self.child = subprocess.Popen(["sleep", "600"]).pid
            asked[0].ids[0] = self.child
        run = Run(asked, lambda _, __: None)
        while not run.is_done:
            for i, one in enumerate(asked):
                if one.added_s is not None and len(one.tokens) < one.max_tokens:
                    run.took(i, [one.ids[0]])
            if what == SHORT:
                return

    def about(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "model": self.settings["model"], "threads": os.environ["OMP_NUM_THREADS"],
                "cap": os.environ.get("ATEN_CPU_CAPABILITY")}  # fmt: skip


if __name__ == "__main__":
    serve(Worker)
