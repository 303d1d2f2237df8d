"""What a turn continues: the stored turn before it, and what of its tokens the new prompt begins with.

What it is: the history of one turn, its prompt, and why less of it was found than could have been. What it knows
nothing about: storage, HTTP. Invariants: the prompt's text is the template's, whatever was stored; token ids that
were computed are kept where they spell it; a reason is told only where less was found than was kept, the first of what
differs between the two requests; tokens count as reusable where both prompts have them from the start; no token stays
known that was computed with an item which is there no more.
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
from nanovllm.serve.context import Services, Tenant
from nanovllm.serve.conversation import Conversation
from nanovllm.serve.items import Stored
from nanovllm.serve.knowledge import prompt_of
from nanovllm.serve.reception import BYTES_PER_S, RENDER_S, check_length, check_size, within
from nanovllm.state.objects import Session

REASONS = (  # what is compared between two turns, and the reason that it is; the first that differs is told
    ("model", "model_changed"),
    ("tools", "tools_changed"),
    ("reasoning_effort", "reasoning_effort_changed"),
    ("chat_template_kwargs", "input_changed"),
    ("instructions", "input_changed"),
    ("knowledge", "knowledge_changed"),
)
DELETED, REWRITTEN, NOT_KEPT = "item_deleted", "history_rewritten", "kv_not_kept"  # where no field differs
OPENAI = ("model_changed", "tools_changed", "reasoning_effort_changed", "input_changed")  # its words; the last for ours
Mark = Sequence[int]  # [items, tokens]: so many tokens were computed when there were no more than so many items


@dataclass(frozen=True)
class History:
    """The stored turn before this one; empty for a first turn. `asked`: what may change between turns.

    `is_cut`: items were deleted since then, and `token_ids` end before them.
    """

    items: Sequence[Stored] = ()
    token_ids: Sequence[int] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    marks: Sequence[Mark] = ()
    is_cut: bool = False

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], token_ids: Sequence[int], facts: Mapping[str, Any]) -> History:
        """From a stored session."""
        items, asked = [dict(item) for item in messages], facts.get("asked", {})
        return cls(items, token_ids, asked, facts.get("marks", ()), facts.get("is_cut", False))

    def facts_after(self, num_items: int, num_prompt: int, items: int, token_ids: Sequence[int]) -> dict[str, Any]:
        """What a conversation remembers of a turn: `num_items` and `num_prompt` before the answer, the rest with it."""
        same = num_same(self.token_ids, token_ids)
        marks = [[*mark] for mark in self.marks if mark[1] <= same]
        return {"marks": [*marks, [num_items, num_prompt], [items, len(token_ids)]], "is_cut": False}


def without_item(talk: Session, place: int) -> Session:
    """A stored conversation without one item, and without the tokens that were computed with it."""
    marks = [mark for mark in talk.facts.get("marks", ()) if mark[0] <= place]
    known = talk.token_ids[: marks[-1][1] if marks else 0]
    is_cut = talk.facts.get("is_cut", False) or len(known) < len(talk.token_ids)
    facts = {**talk.facts, "marks": marks, "is_cut": is_cut}
    return Session([*talk.messages[:place], *talk.messages[place + 1 :]], known, facts)


async def prompt_after(
    services: Services, tenant: Tenant, history: History, chat: Conversation, names: Sequence[str] | None
) -> Prompt:
    """The conversation's token ids, the history's own where they fit, with these documents; it fits the model.

    Raises InvalidRequestError, ContextLengthError, StateNotFoundError.
    """
    known = history.token_ids if max(history.token_ids, default=0) < services.engine.info.vocab_size else ()
    if names:
        return await prompt_of(services, tenant, chat, names, known)
    size = sum(len(turn["content"]) for turn in chat.messages)
    check_size(size, services, "messages")
    work = partial(extended, services.engine.tokenizer, known, chat)
    ids = await within(services.pool, work, RENDER_S + size / BYTES_PER_S, "messages")
    check_length(len(ids), services, "messages")
    return Prompt(ids)


def extended(tokenizer: ChatTokenizer, known: Sequence[int], chat: Conversation) -> list[int]:
    """The same, of a conversation of any length."""
    return tokenizer.extend_chat(known, chat.messages, chat.add_generation_prompt, chat.tools, **chat.variables)


@dataclass(frozen=True)
class Diagnosis:
    """How much of a stored turn its successor found. `reason`: None for a hit.

    `reusable`: tokens that both prompts begin with; `changed`: what differed between the two requests.
    """

    reason: str | None
    reusable: int
    missed: int
    changed: tuple[str, ...] = ()

    def as_openai(self) -> dict[str, Any]:
        """As OpenAI's `prompt_cache_diagnostics`, which has no word for KV that was not kept and fewer for the rest."""
        if self.reason is None:
            return {"type": "cache_hit"}
        if self.reason == NOT_KEPT:
            return {"type": "unavailable"}
        counts = {"cache_missed_tokens": self.missed, "comparison_reusable_tokens": self.reusable}
        return {"type": "cache_miss", "reason": self.reason if self.reason in OPENAI else OPENAI[-1], **counts}

    def as_own(self) -> dict[str, Any]:
        """As this server says it, beside the usage."""
        return {"miss_reason": self.reason, "reusable_tokens": self.reusable, "changed": [*self.changed]}


def diagnose(
    history: History, prompt: Sequence[int], asked: Mapping[str, Any], finished: Sequence[Finished], block_size: int
) -> Diagnosis | None:
    """Why the prompt found less than the history's tokens; None where there is no history to compare with."""
    if not history.token_ids and not history.is_cut:
        return None
    reusable = num_same(history.token_ids, prompt)
    cached = sum(one.cached_tokens for one in finished)
    whole = (reusable - 1) // block_size * block_size  # of the last token there never was KV
    compared = [(name, word) for name, word in REASONS if name in history.asked]
    changed = {name: word for name, word in compared if history.asked[name] != asked.get(name)}
    if reusable < len(history.token_ids) or history.is_cut:
        reason = next(iter(changed.values()), DELETED if history.is_cut else REWRITTEN)
        return Diagnosis(reason, reusable, len(prompt) - reusable, (*changed,))
    why = "model_changed" if "model" in changed else NOT_KEPT
    return Diagnosis(None if cached >= whole else why, reusable, len(prompt) - cached, (*changed,))


def num_same(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
