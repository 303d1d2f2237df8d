"""An engine that a prompt's first token slows down, stalls or breaks: the same in a thread and in a child process.

python -m tests.serve.breakable FD     started by links.ProcessLink, in place of engine_process
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine import engine_process, links
from nanovllm.engine.build import build_engine
from nanovllm.engine.llm_engine import LLMEngine

SLOW, STALLING, FAULTY = 201, 202, 203  # a step with such a request is slow, takes very long, fails
DELAY_S = {SLOW: 0.01, STALLING: 1.5}
SECRET = "secret 0x7f00deadbeef"  # noqa: S105


def breakable_engine(config: EngineConfig) -> LLMEngine:
    """The engine of the configuration; its forward pass looks at whom it is for."""
    engine = build_engine(config)
    launch = engine.runner.launch

    def launch_or_not(batch: object) -> object:
        first = {seq.token_ids[0] for seq in engine.scheduler.running if seq.num_scheduled_tokens}
        if FAULTY in first:
            raise OSError(SECRET)
        time.sleep(max(DELAY_S.get(token_id, 0.0) for token_id in first))
        return launch(batch)  # type: ignore[arg-type]

    engine.runner.launch = launch_or_not  # type: ignore[method-assign]
    return engine


@contextmanager
def breakable() -> Iterator[None]:
    """Engines that start meanwhile are breakable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "build_engine", breakable_engine)
        patch.setattr(links, "CHILD_MODULE", __name__)
        yield


if __name__ == "__main__":
    engine_process.build_engine = breakable_engine
    engine_process.main()
