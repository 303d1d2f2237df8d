"""llama.cpp by llama-cpp-python: its `Llama`, which serves one sequence and keeps the last prompt's KV."""

from __future__ import annotations

from typing import Any

import llama_cpp
from worker_loop import Asked, Run, serve


class Worker:
    """The GGUF file itself, as it is quantised."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.options = {"n_ctx": settings["max_model_len"], "n_batch": 2048, "n_ubatch": 512}
        self.llama = llama_cpp.Llama(
            settings["model"],
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            verbose=False,
            **self.options,
        )

    def run(self, asked: list[Asked]) -> None:
        """Greedy tokens of the one request."""
        if len(asked) != 1:
            raise ValueError("llama-cpp-python's Llama serves one sequence at a time")
        run = Run(asked, lambda _, __: None)
        for token in self.llama.generate(asked[0].ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            run.took(0, [int(token)])
            if run.is_done:
                return

    def about(self) -> dict[str, Any]:
        """Versions, and what the library was compiled for."""
        return {
            "versions": {"llama-cpp-python": llama_cpp.__version__},
            "system": llama_cpp.llama_print_system_info().decode(),
            **self.options,
        }


if __name__ == "__main__":
    serve(Worker)
