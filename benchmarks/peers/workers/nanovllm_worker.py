"""This engine, one configuration for every row: see `Engine.settings` of the driver."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from worker_loop import Asked, Run, serve

from nanovllm import LLM, SamplingParams, __version__


class Worker:
    """The offline engine, stepped by the caller."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.llm = LLM(
            settings["model"],
            dtype=settings["dtype"],
            num_threads=settings["threads"],
            max_model_len=settings["max_model_len"],
            **settings["engine"],
        )
        self.engine = self.llm.engine

    def run(self, asked: list[Asked]) -> None:
        """Step until all have ended."""
        index: dict[str, int] = {}

        def add(i: int, one: Asked) -> None:
            params = SamplingParams(temperature=0, max_tokens=one.max_tokens, ignore_eos=True)
            index[self.engine.add_request(one.ids, params)] = i

        run = Run(asked, add)
        while not run.is_done:
            for out in self.engine.step():
                if out.final is not None and out.final.error is not None:
                    raise out.final.error
                run.took(index[out.request_id], out.token_ids)
        while not self.engine.is_finished():
            self.engine.step()

    def about(self) -> dict[str, Any]:
        """What is set, and what the machine made of it."""
        config, model = self.llm.config, self.engine.runner.model
        return {
            "versions": {"nanovllm": __version__, "torch": torch.__version__},
            "kernels": model.kernels.name,
            "linears": type(model.head).__name__,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_prefill_chunk": config.max_prefill_chunk,
            "max_prefill_beside_decode": config.max_prefill_beside_decode,
            "prefix_mode": config.prefix_mode,
            "block_size": config.block_size,
        }


if __name__ == "__main__":
    serve(Worker)
