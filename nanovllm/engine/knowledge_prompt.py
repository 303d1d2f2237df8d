"""Documents in a conversation's prompt: which token ids they are, where they stand, in which order.

What it is: from documents and messages to `Segment`s. What it knows nothing about: where documents are kept, who
may read them, HTTP. Invariants: a document's ids depend on its own text and template, never on what stands around
it; nothing in it becomes a control token; documents stand at the end of the system message, public ones first,
then by name and version, whatever order they were named in: the same set makes the same prefix.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nanovllm.core.segments import Segment, SegmentSpan
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.models.chat_tokenizer import ChatTokenizer, unused_character
from nanovllm.state.objects import PUBLIC, Document

SLOT = "{document}"
TEMPLATE = f"\n\n{SLOT}"
SYSTEM_ROLES = ("system", "developer")
_ANY_QUESTION = {"role": "user", "content": "?"}

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Passage:
    """A document as prompts carry it: the ids of its text within its template, and its own system text."""

    label: str
    namespace: str
    token_ids: tuple[int, ...]
    system: str = ""

    @property
    def rank(self) -> tuple[bool, str, str]:
        """Its place among others: what most prompts share goes first."""
        return self.namespace != PUBLIC, self.label, self.namespace

    @cached_property
    def identity(self) -> str:
        """Its name and what it says: another text under the same name is another document."""
        content = struct.pack(f"<{len(self.token_ids)}q", *self.token_ids) + self.system.encode()
        return f"{self.label} {hashlib.sha256(content).hexdigest()}"


def check_template(template: str) -> None:
    """Raise InvalidRequestError unless `template` has one slot for the document."""
    if template.count(SLOT) != 1:
        raise InvalidRequestError(f"template must have {SLOT} once.", param="template", hint=f"Default: {TEMPLATE!r}.")


def passage_of(tokenizer: ChatTokenizer, document: Document | str, label: str, namespace: str = "") -> Passage:
    """What was put, as a prompt carries it. Raises InvalidRequestError for a template without a slot."""
    if isinstance(document, str):
        document = Document(document)
    template = document.template or TEMPLATE
    check_template(template)
    before, _, after = template.partition(SLOT)
    ids: list[int] = []
    for text in (before, document.text, after):
        ids += tokenizer.encode(text, parse_special=False, add_bos=False)
    return Passage(label, namespace, tuple(ids), document.system)


def in_order(passages: Iterable[Passage]) -> list[Passage]:
    """Each once, as they stand in a prompt."""
    return sorted(dict.fromkeys(passages), key=lambda passage: passage.rank)


def chat_segments(
    tokenizer: ChatTokenizer,
    messages: Messages,
    passages: Iterable[Passage],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    known: Sequence[int] = (),
    **variables: Any,
) -> list[Segment]:
    """The conversation with the documents in it: `system`, each `document NAME@VERSION`, `question`.

    The question goes on in the `known` ids of a turn before, where that one had the same documents at the same place.

    Where it has no system message, the first document's own system text stands there. Raises
    InvalidRequestError where the model's template does not show the system message exactly once.
    """
    ordered = in_order(passages)
    slot = unused_character([list(messages), list(tools or ()), variables, [p.system for p in ordered]])
    held = _with_slots(messages, ordered, slot)
    texts = [passage.token_ids for passage in ordered]
    pieces = tokenizer.encode_chat_around(slot, texts, held, add_generation_prompt, tools, known=known, **variables)
    if len(pieces) != len(ordered) + 1 or any(pieces[1:-1]):
        raise InvalidRequestError(
            "This model's chat template does not show the system message once: there is no place for knowledge.",
            param="knowledge",
            hint="Put the text into a message.",
        )
    middle = [Segment(f"document {passage.label}", list(passage.token_ids)) for passage in ordered]
    return [Segment("system", pieces[0]), *middle, Segment("question", pieces[-1])]


def path_of(
    tokenizer: ChatTokenizer, document: Document, label: str, max_model_len: int
) -> tuple[Document, list[Segment]]:
    """The document with the ids of its path, and the path: a prompt from its start to its only document's end.

    Raises ContextLengthError where not even a short question fits behind it.
    """
    passage = passage_of(tokenizer, document, label)
    segments = chat_segments(tokenizer, [_ANY_QUESTION], [passage])
    if len(ids_of(segments)) >= max_model_len:
        raise ContextLengthError(
            f"With this document a short question has {len(ids_of(segments)):,} tokens, of which"
            f" {max_model_len - 1:,} fit the model.",
            param="text",
            hint="Nothing was kept. Split the text into documents that fit.",
        )
    return replace(document, token_ids=ids_of(segments[:-1])), segments[:-1]


def ids_of(segments: Iterable[Segment]) -> list[int]:
    """The prompt's token ids."""
    return [token_id for segment in segments for token_id in segment.content if isinstance(token_id, int)]


def spans_of(segments: Iterable[Segment]) -> tuple[SegmentSpan, ...]:
    """Where each lies."""
    spans, start = [], 0
    for segment in segments:
        spans.append(SegmentSpan(segment.name, start, start + len(segment.content)))
        start += len(segment.content)
    return tuple(spans)


def _with_slots(messages: Messages, ordered: Sequence[Passage], slot: str) -> list[dict[str, Any]]:
    """The messages, with a slot for each document at the end of the system message."""
    slots, given = slot * len(ordered), [dict(message) for message in messages]
    if given and given[0].get("role") in SYSTEM_ROLES:
        if not isinstance(given[0].get("content"), str):
            raise InvalidRequestError("Beside knowledge the system message is one text.", param="messages[0].content")
        return [given[0] | {"content": given[0]["content"] + slots}, *given[1:]]
    system = next((passage.system for passage in ordered if passage.system), "")
    return [{"role": "system", "content": system + slots}, *given]
