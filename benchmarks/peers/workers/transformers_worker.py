"""transformers: eager `generate` for one request, the manager of `generate_batch` for several."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from worker_loop import Asked, Run, serve

KV_SHARE = 0.2  # of free memory, instead of 0.6: about what the others have, and room beside it for what else runs


class Worker:
    """One model; a manager of continuous batching for each run, made before its clock starts."""

    def __init__(self, settings: dict[str, Any]) -> None:
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.attention = self.model.config._attn_implementation

    def run(self, asked: list[Asked]) -> None:
        """Choose the faster of transformers' two ways for the number of requests."""
        if len(asked) == 1:
            self._generate(asked)
        else:
            self._batch(asked)

    @torch.inference_mode()
    def _generate(self, asked: list[Asked]) -> None:
        run = Run(asked, lambda _, __: None)
        ids = torch.tensor([asked[0].ids])
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked[0].max_tokens,
            min_new_tokens=asked[0].max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=_Streamer(run),
        )

    def _batch(self, asked: list[Asked]) -> None:
        config = transformers.GenerationConfig(
            max_new_tokens=max(one.max_tokens for one in asked), do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        hints = WorkloadHints(
            max_prompt_length=max(len(one.ids) for one in asked),
            max_generated_length=max(one.max_tokens for one in asked),
            num_requests=len(asked),
        )  # as generate_batch gives them
        context = self.model.continuous_batching_context_manager(
            config,
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=KV_SHARE),
            workload_hints=hints,
        )
        with context as manager:

            def add(i: int, one: Asked) -> None:
                manager.add_request(one.ids, str(i), max_new_tokens=one.max_tokens, streaming=streams)

            streams = any(one.after for one in asked)
            begin_s = time.perf_counter()
            run = Run(asked, add)
            seen = [0] * len(asked)
            while not run.is_done:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running() or time.perf_counter() - begin_s > 1800:
                        raise RuntimeError("the manager of continuous batching stopped")
                    continue
                if result.error:
                    raise RuntimeError(result.error)
                i = int(result.request_id)
                run.took(i, result.generated_tokens[seen[i] :])
                seen[i] = len(result.generated_tokens)

    def about(self) -> dict[str, Any]:
        """Versions and the attention that is used."""
        return {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "attention": self.attention,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "kv_memory_share": KV_SHARE,
            "one_request": "generate, eager",
            "several_requests": "continuous batching, the manager of generate_batch",
        }


class _Streamer:
    """Told by `generate` of the prompt first, then of each token."""

    def __init__(self, run: Run) -> None:
        self._run, self._is_prompt = run, True

    def put(self, ids: torch.Tensor) -> None:
        """One token, or the prompt."""
        if not self._is_prompt:
            self._run.took(0, ids.flatten().tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is held back."""


if __name__ == "__main__":
    serve(Worker)
