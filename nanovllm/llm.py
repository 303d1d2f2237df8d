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
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from types import TracebackType
from typing import Any, cast

from nanovllm.config import EngineConfig
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import Segment
from nanovllm.engine.build import build_engine
from nanovllm.engine.intake import Prompt
from nanovllm.engine.knowledge_prompt import Passage, chat_segments, passage_of, path_of
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput, StepOutput
from nanovllm.engine.parts import Progress, RequestArgs
from nanovllm.errors import EngineClosedError, InvalidRequestError, shown
from nanovllm.state.objects import DEFAULT_NAMESPACE, Document, StateId
from nanovllm.state.store import StateStore

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
        self.after_step = self.engine.driver.after_step

    @property
    def state_store(self) -> StateStore:
        """Named state over the tiers of this engine; called in the thread that runs the engine, between steps.

        Raises EngineClosedError after `close`.
        """
        if self.engine.parts.state is None:
            raise EngineClosedError("The engine is closed.", hint="Make a new LLM.")
        return self.engine.parts.state.store

    def generate(
        self,
        prompts: str | Seq[Any],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: int | Seq[int] = 0,
    ) -> list[RequestOutput]:
        """Complete each prompt: a string (special tokens are parsed), token ids, or Segments; or a list of these.

        `priority`, one or one each, ranks them under `policy="priority"`: lower goes first. Returns one
        output per prompt, in order. Raises InvalidRequestError before anything runs.
        """
        batch = as_prompts(prompts)
        params = as_params(sampling_params, len(batch))
        ranks = [priority] * len(batch) if isinstance(priority, int) else list(priority)
        if len(ranks) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts, but {len(ranks)} priorities.", param="priority")
        requests = [
            RequestArgs(prompt=p, sampling_params=s, priority=rank)
            for p, s, rank in zip(batch, params, ranks, strict=True)
        ]
        return self._complete(requests, use_tqdm)

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        knowledge: Seq[str] = (),
    ) -> list[RequestOutput]:
        """Answer one conversation, or several. The output's `template_tokens` is what the template added.

        `chat_template_kwargs` are variables of the template, such as `tools`; `knowledge` names documents that
        `add_knowledge` put, as `name` or `name@version`: they stand in each system message (docs/knowledge.md).
        """
        chats = as_chats(messages)
        params = as_params(sampling_params, len(chats))
        template = dict(chat_template_kwargs or {})
        requests = [self._chat_request(chat, s, template, knowledge) for chat, s in zip(chats, params, strict=True)]
        return self._complete(requests, use_tqdm)

    def add_knowledge(
        self,
        text: str,
        name: str,
        *,
        version: str | None = None,
        system: str = "",
        template: str = "",
        ttl: float | None = None,
    ) -> StateId:
        """Keep a document and compute its KV behind `system`; `knowledge=[name]` then asks about it.

        `template` stands around the text, at its slot `{document}`. The id is one of `state_store`, which pins,
        explains and drops it. Raises ContextLengthError where not even a short question would fit; nothing is kept.
        """
        label = name if version is None else f"{name}@{version}"
        given = Document(text, (), system, template)
        document, path = path_of(self.tokenizer, given, label, self.engine.intake.max_model_len)
        about = {"kind": "knowledge", "name": name, "version": version, "ttl": ttl}
        state_id = self.state_store.put(document, about)
        self._complete(
            [RequestArgs(prompt=path, sampling_params=SamplingParams(max_tokens=1), prefill_only=True)], False
        )
        return state_id

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        knowledge: Seq[str] = (),
    ) -> Iterator[StepOutput]:
        """Increments as they are made, for one prompt or conversation. Closing the iterator aborts the request.

        The request enters, and may be refused, at the first `next`: an iterator nobody starts costs nothing.
        """
        params = as_params(sampling_params, 1)[0]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
            request = self._chat_request(prompt, params, dict(chat_template_kwargs or {}), knowledge)
        elif chat_template_kwargs or knowledge:
            param = "chat_template_kwargs" if chat_template_kwargs else "knowledge"
            raise InvalidRequestError("A plain prompt has no chat template.", param=param)
        else:
            request = RequestArgs(prompt=cast(Prompt, prompt), sampling_params=params)
        request_id = self.engine.add_request(**request)
        for output in self.engine.driver.listen([request_id]):
            yield output
            if output.final is not None:
                _raise_error(output.final)

    def close(self) -> None:
        """Abort what runs and release model and pool. Safe to repeat."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chat_request(
        self, messages: Any, params: SamplingParams, template: dict[str, Any], knowledge: Seq[str]
    ) -> RequestArgs:
        """Template and tokenizer belong to the request's intake time, so its arrival is taken first."""
        arrival_ns = self.engine.clock.now_ns()
        if knowledge:
            prompt: Prompt = chat_segments(self.tokenizer, messages, map(self._passage, knowledge), **template)
            return RequestArgs(prompt=prompt, sampling_params=params, arrival_ns=arrival_ns)
        token_ids = self.tokenizer.encode_chat(messages, **template)
        added = len(token_ids) - self.tokenizer.count_content_tokens(messages)
        return RequestArgs(prompt=token_ids, sampling_params=params, template_tokens=added, arrival_ns=arrival_ns)

    def _passage(self, name: str) -> Passage:
        obj = self.state_store.find(name, DEFAULT_NAMESPACE, kind="knowledge")
        document = cast(Document, self.state_store.get(obj.state_id))
        return passage_of(self.tokenizer, document, obj.label, obj.namespace)

    def _complete(self, requests: list[RequestArgs], use_tqdm: bool) -> list[RequestOutput]:
        outputs = self.engine.generate(requests, _progress_bar(len(requests)) if use_tqdm else iter)
        for output in outputs:
            _raise_error(output)
        return outputs


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts from one prompt or many. A flat list of ints or Segments is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Seq) or isinstance(prompts, bytes):
        raise InvalidRequestError("prompts must be a string, a list of strings, or token ids.", param="prompts")
    if prompts and all(isinstance(part, int | Segment) for part in prompts):
        return [list(prompts)]
    return list(prompts)


def as_chats(messages: Any) -> list[Messages]:
    """A list of conversations from one or many."""
    if not isinstance(messages, list | tuple):
        raise InvalidRequestError("messages must be a list of {role, content}, or a list of such.", param="messages")
    return [list(messages)] if messages and isinstance(messages[0], Mapping) else list(messages)


def as_params(params: SamplingParams | Seq[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams per prompt, from none, one or a list of the right length."""
    if params is None or isinstance(params, SamplingParams):
        return [SamplingParams() if params is None else params] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidRequestError(
            f"sampling_params must be SamplingParams, one or one each, not {shown(params)}.", param="sampling_params"
        )
    if len(params) != count:
        raise InvalidRequestError(
            f"{count} prompts, but {len(params)} sampling_params.",
            param="sampling_params",
            hint="Give one for all, or one for each.",
        )
    return list(params)


def _progress_bar(total: int) -> Progress:
    from tqdm import tqdm

    return partial(tqdm, total=total, desc="Generating", unit="request", file=sys.stderr)


def _raise_error(final: RequestOutput) -> None:
    if final.error is not None:
        raise final.error
