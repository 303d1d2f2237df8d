"""A text completion's answer as JSON or as chunks, out of the engine's deltas.

What it is: two renderings of the same parts. What it knows nothing about: sockets,
requests. Invariants: choice `prompt * n + sample` is that sample of that prompt; the
texts of a stream's chunks join to the whole one; with echo the prompt comes first.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nanovllm.engine.messages import Delta, Finished
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.serve.chat_answer import usage_of
from nanovllm.serve.logprobs import TextLogprobs
from nanovllm.serve.merging import Batch
from nanovllm.serve.sse import DONE, ChunkFrames, json_text

KIND = "text_completion"


@dataclass(frozen=True)
class Head:
    """What an answer needs to know of its request. `echoes`: per prompt, the text that precedes its answer."""

    model: str
    n: int
    echoes: list[str]
    tokenizer: ChatTokenizer
    logprobs: int | None = None
    has_usage: bool = False
    running_usage_of: list[int] = field(default_factory=list)  # each prompt's tokens; none: no chunk tells it
    answer_id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_choices(self) -> int:
        """Choices of the whole answer."""
        return self.n * len(self.echoes)

    def text_logprobs(self) -> list[TextLogprobs]:
        """One for each choice."""
        return [TextLogprobs(self.tokenizer, 0, with_top=bool(self.logprobs)) for _ in range(self.num_choices)]


class TextWhole:
    """The answer as one JSON object."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._texts = [[echo] for echo in head.echoes for _ in range(head.n)]
        self._reasons: list[str | None] = [None] * head.num_choices
        self._stops: list[str | int | None] = [None] * head.num_choices
        self._logprobs: list[list[Any]] = [[] for _ in range(head.num_choices)]

    def add(self, batch: Batch) -> bytes:
        """Collect; nothing is sent before the end."""
        for prompt, deltas in batch:
            for delta in deltas:
                choice = prompt * self._head.n + delta.index
                self._texts[choice].append(delta.text)
                self._logprobs[choice] += delta.logprobs or []
                self._reasons[choice], self._stops[choice] = delta.finish_reason, delta.stop_reason
        return b""

    def end(self, finished: list[Finished]) -> bytes:
        """The body."""
        head = self._head
        logprobs: list[Any] = [None] * head.num_choices
        if head.logprobs is not None:
            logprobs = [part.part(tokens) for part, tokens in zip(head.text_logprobs(), self._logprobs, strict=True)]
        choices = [
            {
                "index": index,
                "text": "".join(texts),
                "logprobs": logprobs[index],
                "finish_reason": self._reasons[index],
                "stop_reason": self._stops[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        whole = {"id": head.answer_id, "object": KIND, "created": head.created, "model": head.model}
        return msgspec.json.encode(whole | {"choices": choices, "usage": usage_of(finished)})


class TextStream:
    """The answer as chunks."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._frames = ChunkFrames(
            head.answer_id,
            KIND,
            head.created,
            head.model,
            head.num_choices,
            has_usage=head.has_usage,
            prompt_tokens=[tokens for tokens in head.running_usage_of for _ in range(head.n)],
        )
        self._echoes = list(head.echoes) if any(head.echoes) else []
        self._logprobs = head.text_logprobs()

    def add(self, batch: Batch) -> bytes:
        """The frames of a step."""
        frames = [
            self._frames.chunk(prompt * self._head.n + sample, b'"text":' + json_text(echo))
            for prompt, echo in enumerate(self._echoes)
            for sample in range(self._head.n)
        ]
        self._echoes = []
        for prompt, deltas in batch:
            for delta in deltas:
                self._add(prompt * self._head.n + delta.index, delta, frames)
        return b"".join(frames)

    def end(self, finished: list[Finished]) -> bytes:
        """The usage, if it was asked for, and the end."""
        return self._frames.usage(usage_of(finished)) + DONE if self._head.has_usage else DONE

    def _add(self, choice: int, delta: Delta, frames: list[bytes]) -> None:
        self._frames.count(choice, len(delta.token_ids))
        logprobs = None
        if self._head.logprobs is not None and delta.logprobs:
            logprobs = self._logprobs[choice].part(delta.logprobs)
        if delta.text or logprobs is not None or delta.finish_reason is not None:
            frames.append(self._frames.chunk(choice, b'"text":' + json_text(delta.text), logprobs, delta.finish_reason))
