"""A chat's answer as JSON or as chunks, out of the engine's deltas.

What it is: two renderings over the same samples, so that a stream's pieces join to the
whole. What it knows nothing about: sockets, requests. Invariants: the first chunk of a
choice carries its role, the last its finish_reason and nothing follows but the usage;
what is written as calls never shows as content.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nanovllm.engine.messages import Delta, Finished
from nanovllm.engine.outputs import TokenLogprobs
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.serve.logprobs import chat_logprobs
from nanovllm.serve.merging import Batch
from nanovllm.serve.sse import DONE, ChunkFrames, json_text
from nanovllm.serve.tool_calls import Call, CallParser, Piece, parser_for
from nanovllm.serve.tools import ToolUse

KIND, CHUNK_KIND = "chat.completion", "chat.completion.chunk"
_ROLE = b'"delta":{"role":"assistant","content":""}'
_NOTHING = b'"delta":{}'


@dataclass(frozen=True)
class Head:
    """What an answer needs to know of its request."""

    model: str
    n: int
    use: ToolUse
    tokenizer: ChatTokenizer
    logprobs: int | None = None
    has_usage: bool = False
    running_usage_of: int = 0  # the prompt's tokens, where each chunk tells the usage so far
    answer_id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))


class Sample:
    """One choice while it grows."""

    def __init__(self, head: Head) -> None:
        self._parser: CallParser | None = parser_for(head.use) if head.use.is_offered else None
        self._reason: str | None = None
        self.num_calls = 0
        self.logprobs: list[TokenLogprobs] = []

    def take(self, delta: Delta) -> list[Piece]:
        """What became certain with `delta`; at its end, everything."""
        self.logprobs += delta.logprobs or []
        if self._parser is None:
            pieces: list[Piece] = [delta.text] if delta.text else []
        else:
            pieces = self._parser.feed(delta.text)
            if delta.finish_reason is not None:
                pieces += self._parser.finish()
        self.num_calls += sum(isinstance(piece, Call) for piece in pieces)
        self._reason = delta.finish_reason
        return pieces

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for why it ended, once it has."""
        return "tool_calls" if self.num_calls and self._reason == "stop" else self._reason


class ChatWhole:
    """The answer as one JSON object."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._samples = [Sample(head) for _ in range(head.n)]
        self._pieces: list[list[Piece]] = [[] for _ in range(head.n)]

    def add(self, batch: Batch) -> bytes:
        """Collect; nothing is sent before the end."""
        for _, deltas in batch:
            for delta in deltas:
                self._pieces[delta.index] += self._samples[delta.index].take(delta)
        return b""

    def end(self, finished: list[Finished]) -> bytes:
        """The body."""
        head = self._head
        return msgspec.json.encode(
            {
                "id": head.answer_id,
                "object": KIND,
                "created": head.created,
                "model": head.model,
                "choices": [self._choice(index) for index in range(head.n)],
                "usage": usage_of(finished),
            }
        )

    def _choice(self, index: int) -> dict[str, Any]:
        sample, pieces = self._samples[index], self._pieces[index]
        calls = [_call_object(piece) for piece in pieces if isinstance(piece, Call)]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = calls
        logprobs = _logprobs(self._head, sample.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": sample.finish_reason}


class ChatStream:
    """The answer as chunks."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._samples = [Sample(head) for _ in range(head.n)]
        self._is_plain = head.logprobs is None and not head.use.is_offered
        self._frames = ChunkFrames(
            head.answer_id,
            CHUNK_KIND,
            head.created,
            head.model,
            head.n,
            has_usage=head.has_usage,
            prompt_tokens=[head.running_usage_of] * head.n if head.running_usage_of else (),
        )
        self._has_role = False

    def add(self, batch: Batch) -> bytes:
        """The frames of a step."""
        frames: list[bytes] = []
        if not self._has_role:
            self._has_role = True
            frames += [self._frames.chunk(index, _ROLE) for index in range(self._head.n)]
        for _, deltas in batch:
            for delta in deltas:
                self._add(delta, frames)
        return b"".join(frames)

    def end(self, finished: list[Finished]) -> bytes:
        """The usage, if it was asked for, and the end."""
        return self._frames.usage(usage_of(finished)) + DONE if self._head.has_usage else DONE

    def _add(self, delta: Delta, frames: list[bytes]) -> None:
        self._frames.count(delta.index, len(delta.token_ids))
        if self._is_plain and delta.finish_reason is None:  # the hot path: a token's text
            if delta.text:
                frames.append(self._frames.chunk(delta.index, b'"delta":{"content":' + json_text(delta.text) + b"}"))
            return
        sample = self._samples[delta.index]
        first_call = sample.num_calls
        for piece in sample.take(delta):
            if isinstance(piece, Call):
                payload = _call_delta(first_call, piece)
                first_call += 1
            else:
                payload = b'"delta":{"content":' + json_text(piece) + b"}"
            frames.append(self._frames.chunk(delta.index, payload, self._taken_logprobs(sample)))
        if delta.finish_reason is not None:
            frames.append(self._frames.chunk(delta.index, _NOTHING, self._taken_logprobs(sample), sample.finish_reason))

    def _taken_logprobs(self, sample: Sample) -> dict[str, Any] | None:
        """Those of tokens that no chunk has shown yet."""
        taken, sample.logprobs = sample.logprobs, []
        return _logprobs(self._head, taken) if taken else None


def usage_of(finished: Sequence[Finished]) -> dict[str, Any]:
    """Tokens of all prompts and samples; a prompt counts once, however many samples it has."""
    prompt = sum(one.prompt_tokens for one in finished)
    completion = sum(one.completion_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in finished)},
        "nanovllm": {"hit_tokens_by_tier": hit_tokens_by_tier(finished)},
    }


def hit_tokens_by_tier(finished: Sequence[Finished]) -> dict[str, int]:
    """Where the cached tokens lay, tiers without any left out; the sum is `cached_tokens`."""
    tiers: Counter[str] = Counter()
    for one in finished:
        tiers.update(one.hit_tokens_by_tier)
    return {tier: tokens for tier, tokens in tiers.items() if tokens}


def _logprobs(head: Head, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
    if head.logprobs is None:
        return None
    return {"content": chat_logprobs(head.tokenizer, logprobs, with_top=head.logprobs > 0), "refusal": None}


def _call_object(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _call_delta(index: int, call: Call) -> bytes:
    return b'"delta":' + msgspec.json.encode({"tool_calls": [{"index": index, **_call_object(call)}]})
