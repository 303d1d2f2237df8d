"""Text to token ids and back, over the `tokenizers` library.

What it is: the tokenizer of every model read from a file. What it knows nothing
about: weights, requests, streams. Invariants: `encode` gives the ids that the model's
own tokenizer gives; text marked as ordinary never yields a control token's id.

Two backends share one vocabulary. The second one (`_plain`) leaves the spellings of
control tokens as text, and knows each control token under a private alias instead:
rendered chats are encoded by it in one pass, genuine control tokens written as
aliases. Aliases contain a random nonce, so that no request can spell one.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from nanovllm.models import tokenizer_gguf, tokenizer_hf
from nanovllm.models.chat_tokenizer import ChatTokenizer, check_unicode


class Tokenizer(ChatTokenizer):
    """A byte-level or sentencepiece vocabulary with its special tokens and chat template."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos: bool | None = None,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`add_bos` None leaves it to the backend's post-processor; `variables` go to the template."""
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        super().__init__({t.content: i for i, t in added.items() if t.special}, chat_template)
        self._backend = backend
        self._variables = dict(variables or {})
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_token_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)
        self._processor_adds_bos = backend.encode("").ids[:1] == [self.bos_token_id]
        self._adds_bos = self._processor_adds_bos if add_bos is None else add_bos and self.bos_token_id is not None
        self._aliases = {spelling: f"\U0010fffd{secrets.token_hex(8)}:{spelling}" for spelling in self.special_tokens}
        self._plain, self._alias_ids = self._plain_backend(added)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json and its companions. ModelFileError if absent or malformed."""
        return cls(**tokenizer_hf.read(directory))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from `tokenizer.*` metadata. UnsupportedModelError names a kind not implemented."""
        return cls(**tokenizer_gguf.build(metadata))

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = True) -> list[int]:
        check_unicode(text)
        backend = self._backend if parse_special else self._plain
        ids = backend.encode(text, add_special_tokens=add_bos).ids
        if not add_bos or self.bos_token_id is None:
            return ids
        bare = ids[1:] if self._processor_adds_bos else ids
        if not self._adds_bos or bare[:1] == [self.bos_token_id]:
            return bare
        return [self.bos_token_id, *bare]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def vocabulary(self) -> str:
        """The backend as JSON, for who compiles grammars."""
        return self._backend.to_str()

    def id_to_token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id)

    def template_variables(self) -> dict[str, Any]:
        return self._variables | super().template_variables()

    def _plain_backend(self, added: Mapping[int, AddedToken]) -> tuple[Backend, dict[int, int]]:
        """The second backend, and the map from its alias ids to the real ones."""
        plain = Backend.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        specials = {token_id: token for token_id, token in added.items() if token.special}
        plain.add_tokens([self._alias(token) for token in specials.values()])
        alias_ids = {token.content: alias_id for alias_id, token in plain.get_added_tokens_decoder().items()}
        return plain, {alias_ids[self._aliases[token.content]]: i for i, token in specials.items()}

    def _alias(self, token: AddedToken) -> AddedToken:
        """A token that matches where `token` would, but is not special."""
        return AddedToken(
            self._aliases[token.content],
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=False,
            special=False,
        )

    def _encode_guarded(self, text: str, sentinel: str) -> list[int]:
        check_unicode(text)
        aliased = self._special_pattern.sub(lambda match: self._aliases[match[0]], text)
        ids = self._plain.encode(aliased.replace(sentinel, ""), add_special_tokens=False).ids
        return [self._alias_ids.get(token_id, token_id) for token_id in ids]
