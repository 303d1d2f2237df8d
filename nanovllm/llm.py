"""LLM: the offline face of the engine. Prompts in, texts out, all in the caller's thread.

What it is: a wrapper that turns what people write (strings, chats, one parameter set
for all) into the engine's requests, and steps it until they are answered. What it
knows nothing about: scheduling, blocks, tensors. Invariants: outputs come in the order
of the prompts; a call that is left early, by an exception or by closing a stream,
aborts its requests and gives their blocks back.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from types import TracebackType
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import Segment
from nanovllm.engine.build import build_engine
from nanovllm.engine.intake import Prompt
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput, StepOutput
from nanovllm.errors import InvalidRequestError

IDLE_S = 0.0005  # between two looks at a load of state that has not arrived
Messages = list[dict[str, Any]]


class LLM:
    """A model, ready to answer. `with LLM(...) as llm:` releases everything at the end."""

    def __init__(self, model: str | os.PathLike[str], *, progress: bool = True, **settings: Any) -> None:
        """`model`: directory, .gguf file, hub id, the alias smollm2 or tiny:random. Settings: see EngineConfig."""
        self._start(EngineConfig.from_kwargs(model, **settings), progress)

    @classmethod
    def from_config(cls, config: EngineConfig, *, progress: bool = True) -> LLM:
        """The same from a ready config, such as `EngineConfig.load` merges from file, environment and flags."""
        llm = cls.__new__(cls)
        llm._start(config, progress)
        return llm

    def _start(self, config: EngineConfig, progress: bool) -> None:
        self.config = config
        self.engine: LLMEngine = build_engine(config, progress=progress)
        self.tokenizer = self.engine.parts.tokenizer
        self.after_step: list[Callable[[], None]] = []  # called between two steps: live logs, interrupts
        self._mailboxes: dict[str, deque[StepOutput]] = {}

    def generate(
        self,
        prompts: str | Seq[Any],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete each prompt: a string (special tokens are parsed), token ids, or Segments; or a list of these.

        Returns one output per prompt, in order. Raises InvalidRequestError before anything runs.
        """
        batch = as_prompts(prompts)
        params = as_params(sampling_params, len(batch))
        return self._complete(
            [{"prompt": p, "sampling_params": s} for p, s in zip(batch, params, strict=True)], use_tqdm
        )

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several. The output's `template_tokens` is what the template added."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = as_params(sampling_params, len(chats))
        calls = [self._chat_call(chat, s, template) for chat, s in zip(chats, params, strict=True)]
        return self._complete(calls, use_tqdm)

    def stream(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None, **template: Any
    ) -> Iterator[StepOutput]:
        """Increments as they are made, for one prompt or conversation. Closing the iterator aborts the request."""
        params = sampling_params or SamplingParams()
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)
        call = self._chat_call(prompt, params, template) if is_chat else {"prompt": prompt, "sampling_params": params}
        request_id = self._add(call)
        try:
            while True:
                for output in self._next_outputs(request_id):
                    yield output
                    if output.final is not None:
                        _raise_error(output.final)
                        return
        finally:
            self._drop([request_id])

    def close(self) -> None:
        """Abort what runs and release model and pool. Safe to repeat."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- driving the engine ------------------------------------------------------------------------

    def _chat_call(self, messages: Any, params: SamplingParams, template: dict[str, Any]) -> dict[str, Any]:
        """Template and tokenizer belong to the request's intake time, so its arrival is taken first."""
        arrival_ns = self.engine.clock.now_ns()
        token_ids = self.tokenizer.encode_chat(messages, **template)
        added = len(token_ids) - self.tokenizer.count_content_tokens(messages)
        return {"prompt": token_ids, "sampling_params": params, "template_tokens": added, "arrival_ns": arrival_ns}

    def _add(self, call: dict[str, Any]) -> str:
        request_id = self.engine.add_request(**call)
        self._mailboxes[request_id] = deque()
        return request_id

    def _complete(self, calls: list[dict[str, Any]], use_tqdm: bool) -> list[RequestOutput]:
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for call in calls:
                ids.append(self._add(call))
            for final in _with_progress(self._finals(ids), len(ids), use_tqdm):
                done[final.request_id] = final
                _raise_error(final)
        finally:
            self._drop(ids)
        return [done[request_id] for request_id in ids]

    def _finals(self, ids: list[str]) -> Iterator[RequestOutput]:
        """The finished requests among `ids`, as they finish."""
        open_ids = set(ids)
        while open_ids:
            for request_id in list(open_ids):
                mailbox = self._mailboxes[request_id]
                final = mailbox[-1].final if mailbox else None
                mailbox.clear()
                if final is not None:
                    open_ids.discard(request_id)
                    yield final
            if open_ids:
                self._pump()

    def _next_outputs(self, request_id: str) -> list[StepOutput]:
        mailbox = self._mailboxes[request_id]
        while not mailbox:
            self._pump()
        outputs = list(mailbox)
        mailbox.clear()
        return outputs

    def _pump(self) -> None:
        outputs = self.engine.step()
        self._deliver(outputs)
        for call in self.after_step:
            call()
        if not outputs and not self.engine.scheduler.running:
            time.sleep(IDLE_S)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """Each output goes to its request's mailbox, so that streams may interleave."""
        for output in outputs:
            if output.request_id in self._mailboxes:
                self._mailboxes[output.request_id].append(output)

    def _drop(self, ids: Iterable[str]) -> None:
        """Forget requests; those that still run are aborted and their blocks are free when this returns."""
        for request_id in ids:
            self.engine.abort(request_id)
            self._mailboxes.pop(request_id, None)
        self._deliver(self.engine.flush())


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts from one prompt or many. A flat list of ints or Segments is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Seq) or isinstance(prompts, bytes):
        raise InvalidRequestError("prompts must be a string, a list of strings, or token ids.", param="prompts")
    if prompts and all(isinstance(part, int | Segment) for part in prompts):
        return [list(prompts)]
    return list(prompts)


def as_params(params: SamplingParams | Seq[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams per prompt, from none, one or a list of the right length."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{count} prompts, but {len(params)} sampling_params.",
            param="sampling_params",
            hint="Give one for all, or one for each.",
        )
    return list(params)


def _with_progress(finals: Iterator[RequestOutput], total: int, wanted: bool) -> Iterator[RequestOutput]:
    if not wanted:
        return finals
    from tqdm import tqdm

    return iter(tqdm(finals, total=total, desc="Generating", unit="request", file=sys.stderr))


def _raise_error(final: RequestOutput) -> None:
    if final.error is not None:
        raise final.error
