"""llama.cpp by llama-cpp-python: its `Llama` for one request, a loop over `llama_decode` for several.

`Llama` serves one sequence. For several, this file batches as llama.cpp's own server does: each call carries one token
of every sequence that decodes, and fills up to `n_batch` with prompt tokens of those that do not yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
from worker_loop import Asked, Run, serve

N_BATCH, N_UBATCH, ROUND = 2048, 512, 256


class Worker:
    """The GGUF file itself, as it is quantised."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.threads = settings["threads"]
        self.llama = llama_cpp.Llama(
            settings["model"],
            n_ctx=settings["max_model_len"],
            n_batch=N_BATCH,
            n_ubatch=N_UBATCH,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            verbose=False,
        )

    def run(self, asked: list[Asked]) -> None:
        """Greedy tokens of all."""
        if len(asked) == 1:
            self._one(asked)
            return
        longest = max(len(one.ids) + one.max_tokens for one in asked)
        with self._context(len(asked), -(-longest // ROUND) * ROUND) as context:
            Batches(context, asked).run()

    def _one(self, asked: list[Asked]) -> None:
        run = Run(asked, lambda _, __: None)
        for token in self.llama.generate(asked[0].ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            run.took(0, [int(token)])
            if run.is_done:
                return

    @contextmanager
    def _context(self, count: int, length: int) -> Iterator[Any]:
        """A context with room for `count` sequences of `length` tokens, each with KV of its own."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = count * length, count
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = self.threads
        context = llama_cpp.llama_init_from_model(self.llama.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp made no context for {count} sequences of {length} tokens")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    def about(self) -> dict[str, Any]:
        """Versions, and what the library was compiled for."""
        return {
            "versions": {"llama-cpp-python": llama_cpp.__version__},
            "system": llama_cpp.llama_print_system_info().decode(),
            "n_batch": N_BATCH,
            "n_ubatch": N_UBATCH,
            "one_request": "Llama.generate",
            "several_requests": "llama_decode, one token of each that decodes and prompt tokens up to n_batch",
        }


class Batches:
    """The sequences of one run in one context."""

    def __init__(self, context: Any, asked: list[Asked]) -> None:
        self.context, self.asked = context, asked
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
        )
        self.waiting: dict[int, list[int]] = {}  # tokens of each sequence that the model has not seen
        self.seen = [0] * len(asked)
        self.batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)

    def run(self) -> None:
        """Until every sequence has its tokens."""
        run = Run(self.asked, lambda i, one: self.waiting.__setitem__(i, list(one.ids)))
        try:
            while not run.is_done:
                for i, token in self._step():
                    run.took(i, [token])
                    if len(self.asked[i].tokens) < self.asked[i].max_tokens:
                        self.waiting[i] = [token]
        finally:
            llama_cpp.llama_batch_free(self.batch)

    def _step(self) -> list[tuple[int, int]]:
        """One call: the next token of each sequence whose last known token was in it."""
        self.batch.n_tokens, last = 0, {}
        for i in sorted(self.waiting, key=lambda i: len(self.waiting[i])):
            taken = self.waiting[i][: N_BATCH - self.batch.n_tokens]
            for token in taken:
                self._add(i, token)
            self.waiting[i] = self.waiting[i][len(taken) :]
            if taken and not self.waiting[i]:
                last[i] = self.batch.n_tokens - 1
                self.batch.logits[last[i]] = 1
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        self.waiting = {i: tokens for i, tokens in self.waiting.items() if tokens}
        return [(i, self._greedy(row)) for i, row in last.items()]

    def _add(self, i: int, token: int) -> None:
        place, batch = self.batch.n_tokens, self.batch
        batch.token[place], batch.pos[place], batch.logits[place] = token, self.seen[i], 0
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, i
        self.seen[i] += 1
        batch.n_tokens += 1

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocabulary))
        return int(np.frombuffer(address.contents, dtype=np.float32).argmax())


if __name__ == "__main__":
    serve(Worker)
