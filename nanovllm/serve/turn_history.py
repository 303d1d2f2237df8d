"""What a turn continues: the stored turn before it, and what of its tokens the new prompt begins with.

What it is: the history of one turn, its prompt, and why less of it was found than could have been. What it knows
nothing about: storage, HTTP. Invariants: the prompt's text is the template's, whatever was stored; token ids that
were computed are kept where they spell it; a reason is told only where the prompts differ, and of what differs
between the two requests; tokens count as reusable where both prompts have them from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

from nanovllm.engine.messages import Finished
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.serve.answer import Prompt
from nanovllm.serve.context import Services
from nanovllm.serve.conversation import Conversation
from nanovllm.serve.items import Stored
from nanovllm.serve.reception import BYTES_PER_S, RENDER_S, check_length, check_size, within

REASONS = (  # what is compared between two turns, and how OpenAI calls it; the first that differs is told
    ("model", "model_changed"),
    ("tools", "tools_changed"),
    ("reasoning_effort", "reasoning_effort_changed"),
    ("instructions", "input_changed"),
    ("knowledge", "input_changed"),
    ("items", "input_changed"),
)
NOT_KEPT = "kv_not_kept"


@dataclass(frozen=True)
class History:
    """The stored turn before this one; empty for a first turn. `asked`: what may change between turns."""

    items: Sequence[Stored] = ()
    token_ids: Sequence[int] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], token_ids: Sequence[int], facts: Mapping[str, Any]) -> History:
        """From a stored session."""
        return cls([dict(item) for item in messages], token_ids, facts.get("asked", {}))


async def prompt_after(services: Services, history: History, chat: Conversation) -> Prompt:
    """The conversation's token ids, the history's own where they fit; it fits the model.

    Raises InvalidRequestError, ContextLengthError.
    """
    size = sum(len(turn["content"]) for turn in chat.messages)
    check_size(size, services, "messages")
    known = history.token_ids if max(history.token_ids, default=0) < services.engine.info.vocab_size else ()
    work = partial(extended, services.engine.tokenizer, known, chat)
    ids = await within(services.pool, work, RENDER_S + size / BYTES_PER_S, "messages")
    check_length(len(ids), services, "messages")
    return Prompt(ids)


def extended(tokenizer: ChatTokenizer, known: Sequence[int], chat: Conversation) -> list[int]:
    """The same, of a conversation of any length."""
    return tokenizer.extend_chat(known, chat.messages, chat.add_generation_prompt, chat.tools, **chat.variables)


@dataclass(frozen=True)
class Diagnosis:
    """How much of a stored turn its successor found. `reason`: OpenAI's word, or `kv_not_kept`; None for a hit.

    `reusable`: tokens that both prompts begin with; `changed`: what differed between the two requests.
    """

    reason: str | None
    reusable: int
    missed: int
    changed: tuple[str, ...] = ()

    def as_openai(self) -> dict[str, Any]:
        """As OpenAI's `prompt_cache_diagnostics`, which has no word for KV that was not kept."""
        if self.reason is None:
            return {"type": "cache_hit"}
        if self.reason == NOT_KEPT:
            return {"type": "unavailable"}
        counts = {"cache_missed_tokens": self.missed, "comparison_reusable_tokens": self.reusable}
        return {"type": "cache_miss", "reason": self.reason, **counts}

    def as_own(self) -> dict[str, Any]:
        """As this server says it, beside the usage."""
        return {"miss_reason": self.reason, "reusable_tokens": self.reusable, "changed": [*self.changed]}


def diagnose(
    history: History, prompt: Sequence[int], asked: Mapping[str, Any], finished: Sequence[Finished], block_size: int
) -> Diagnosis | None:
    """Why the prompt found less than the history's tokens; None where there is no history to compare with."""
    if not history.token_ids:
        return None
    pairs = zip(history.token_ids, prompt, strict=False)
    reusable = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    cached = sum(one.cached_tokens for one in finished)
    whole = (reusable - 1) // block_size * block_size  # of the last token there never was KV
    compared = [name for name, _ in REASONS if name in history.asked]
    changed = tuple(name for name in compared if history.asked[name] != asked.get(name))
    if reusable < len(history.token_ids):
        reason = next(word for name, word in REASONS if name in (*changed, "items"))
        return Diagnosis(reason, reusable, len(prompt) - reusable, changed)
    if cached >= whole:
        return Diagnosis(None, reusable, len(prompt) - cached, changed)
    return Diagnosis("model_changed" if "model" in changed else NOT_KEPT, reusable, len(prompt) - cached, changed)
