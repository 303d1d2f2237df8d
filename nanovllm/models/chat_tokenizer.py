"""What every tokenizer offers for conversations, whatever its vocabulary.

What it is: the base class that turns messages into token ids, and the guard that
keeps user text from forging control tokens. What it knows nothing about: how text
becomes ids. Invariant: a special id in the result of `encode_chat` was written by
the template, never by a string inside a message.

The guard: within every string of the messages, a sentinel character that occurs in
none of them is put inside each special-token spelling, and after a tail that begins
one (a template may join strings). The template renders the marked messages; spellings
that are whole in its output are the template's own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.models.chat_template import ChatTemplate
from nanovllm.models.known_ids import spelled_prefix

Messages = Sequence[Mapping[str, Any]]
_MAX_DEPTH = 64
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ChatTokenizer(ABC):
    """Base of the tokenizers; subclasses say how text and ids correspond."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    special_ids: frozenset[int]

    def __init__(self, special_tokens: Mapping[str, int], chat_template: str | None) -> None:
        """`special_tokens`: spelling -> id of every control token."""
        self.special_tokens = dict(special_tokens)
        self.special_ids = frozenset(special_tokens.values())
        self.chat_template = chat_template
        spellings = sorted(filter(None, special_tokens), key=len, reverse=True)  # the longest wins
        self._special_pattern = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._beginnings = frozenset(s[:n] for s in spellings for n in range(1, len(s)))
        self._longest_beginning = max(map(len, self._beginnings), default=0)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        # Compiled when first used: a model with a broken template still completes plain text.
        return None if self.chat_template is None else ChatTemplate(self.chat_template)

    @abstractmethod
    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = True) -> list[int]:
        """Token ids of `text`.

        With `parse_special`, spellings of control tokens become their ids; without, they
        are ordinary text. `add_bos` adds what the model's tokenizer adds around a prompt;
        BOS is never doubled. Raises InvalidRequestError for text that is not Unicode
        (lone surrogates).
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; incomplete UTF-8 shows as U+FFFD, ids without a token as nothing."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of one id, or None."""

    @abstractmethod
    def _encode_guarded(self, text: str, sentinel: str) -> list[int]:
        """Ids of rendered text in which forged spellings contain `sentinel`; it is dropped from the rest."""

    def apply_chat_template(
        self,
        messages: Messages,
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str | list[int]:
        """The conversation as the template's text, or with `tokenize` as `encode_chat`'s ids.

        Raises InvalidRequestError if the model has no template or it refuses the messages.
        """
        if tokenize:
            return self.encode_chat(messages, add_generation_prompt, tools, **variables)
        check_messages(messages)
        return self._render(messages, add_generation_prompt, tools, variables)

    def encode_chat(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of the rendered conversation; special spellings inside any message string stay text.

        Without such spellings, equal to `encode` of the rendered text without added BOS.
        """
        text, sentinel = self._guarded(messages, add_generation_prompt, tools, variables)
        return self._encode_guarded(text, sentinel)

    def encode_chat_around(
        self,
        slot: str,
        inserts: Sequence[Sequence[int]],
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        known: Sequence[int] = (),
        **variables: Any,
    ) -> list[list[int]]:
        """As `encode_chat`, cut at each `slot`, a character that the messages hold where the `inserts` will stand.

        Each piece is encoded by itself, so that its ids do not depend on what is put between them. The last one begins
        with the `known` ids of a prompt before, as in `extend_chat`, where that prompt had the same ids up to there.
        """
        text, sentinel = self._guarded(messages, add_generation_prompt, tools, variables)
        *before, last = text.split(slot)
        pieces = [self._encode_guarded(piece, sentinel) for piece in before]
        front = [i for part in zip(pieces, inserts, strict=False) for ids in part for i in ids]
        rest = known[len(front) :] if [*known[: len(front)]] == front else ()
        return [*pieces, self._extended(rest, last, sentinel)]

    def extend_chat(
        self,
        known: Sequence[int],
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """As `encode_chat`, but beginning with as many of the `known` ids as spell the same text.

        A model's own tokens are kept where tokenizing its text again would cut it otherwise, so that KV which was
        computed for them is found. Without `known`, or where they spell something else, equal to `encode_chat`.
        """
        text, sentinel = self._guarded(messages, add_generation_prompt, tools, variables)
        return self._extended(known, text, sentinel)

    def count_content_tokens(self, messages: Messages) -> int:
        """Tokens of the bare contents, so that a caller can show what the template adds."""
        check_messages(messages)
        return sum(len(self.encode(text, parse_special=False, add_bos=False)) for text in _contents(messages))

    def _extended(self, known: Sequence[int], text: str, sentinel: str) -> list[int]:
        """Ids of guarded text, beginning with those of `known` that spell it."""
        spellings = {token_id: spelling for spelling, token_id in self.special_tokens.items()}
        decode = partial(self.decode, skip_special_tokens=False)
        kept, at = spelled_prefix(
            known, text, sentinel, specials=spellings, pattern=self._special_pattern, decode=decode
        )
        before = spellings.get(known[kept - 1], "") if kept else ""
        rest = self._encode_guarded(before + text[at:], sentinel)
        return [*known[:kept], *(rest[1:] if before else rest)]

    def _guarded(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> tuple[str, str]:
        """The rendered text in which forged spellings contain the sentinel, and the sentinel."""
        check_messages(messages)
        request = [list(messages), None if tools is None else list(tools), dict(variables)]
        sentinel = unused_character(request)
        messages, tools, variables = self._mark(request, sentinel)
        return self._render(messages, add_generation_prompt, tools, variables), sentinel

    def _render(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        if self._template is None:
            raise InvalidRequestError(
                "This model has no chat template.",
                param="messages",
                hint="Use text completion, or a model tuned for conversation.",
            )
        given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        return self._template.render(messages, self.template_variables() | given | dict(variables))

    def template_variables(self) -> dict[str, Any]:
        """Names every template may use besides the request's."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        return {name: self.id_to_token(token_id) for name, token_id in ids.items() if token_id is not None}

    def _mark(self, value: Any, sentinel: str) -> Any:
        """A copy of `value` in which every special spelling, also in keys, contains the sentinel."""
        if isinstance(value, str):
            marked = self._special_pattern.sub(lambda match: match[0][:1] + sentinel + match[0][1:], value)
            return marked + sentinel if self._begins_special(marked) else marked
        if isinstance(value, Mapping):
            return {self._mark(key, sentinel): self._mark(item, sentinel) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(item, sentinel) for item in value]
        return value

    def _begins_special(self, text: str) -> bool:
        """Whether a special spelling starts at the end of `text`, for the next string to finish."""
        return any(text[-n:] in self._beginnings for n in range(1, min(self._longest_beginning, len(text)) + 1))


def check_messages(messages: Messages) -> None:
    """Raise InvalidRequestError unless `messages` is a list of objects that have a string role."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages must be a list.", param="messages", hint="Wrap the message in a list.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"messages[{index}] is not an object with a string role.",
                param=f"messages[{index}].role",
                hint='Send {"role": "user", "content": "..."}.',
            )


def check_unicode(text: str) -> None:
    """Raise InvalidRequestError for a lone surrogate, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text has a lone surrogate at character {error.start}, which is not Unicode text.",
            hint="Send well-formed UTF-8.",
        ) from error


def _strings(value: Any, depth: int = 0) -> list[str]:
    """Every string in a nested value, keys included."""
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"messages are nested deeper than {_MAX_DEPTH} levels.", param="messages")
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item, depth + 1)]
    return []


def unused_character(value: Any) -> str:
    """A private-use character that occurs in no string of `value`."""
    used = set().union(*_strings(value))
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)


def _contents(messages: Messages) -> list[str]:
    """The texts of the messages, whether content is a string or a list of text parts."""
    texts: list[Any] = []
    for content in (message.get("content") for message in messages):
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        texts += [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [text for text in texts if isinstance(text, str)]
