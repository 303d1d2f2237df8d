"""Log-probabilities as answers show them: tokens as text and bytes.

What it is: a token's spelling, and the two shapes, chat's and text completion's. What it
knows nothing about: streams. Invariant: no number leaves that JSON cannot hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from nanovllm.engine.outputs import TokenLogprobs
from nanovllm.models.chat_tokenizer import ChatTokenizer

LEAST = -9999.0  # stands for minus infinity, as elsewhere
REPLACEMENT = "\ufffd"


def chat_logprobs(tokenizer: ChatTokenizer, logprobs: Sequence[TokenLogprobs], with_top: bool) -> list[dict[str, Any]]:
    """Chat's shape, one entry per token: the chosen one and, `with_top`, the most likely."""
    return [
        {**_entry(tokenizer, *one[0]), "top_logprobs": [_entry(tokenizer, *top) for top in one[1:]] if with_top else []}
        for one in logprobs
    ]


class TextLogprobs:
    """Text completion's shape, which grows with the text: tokens, numbers, alternatives, places in the text."""

    def __init__(self, tokenizer: ChatTokenizer, offset: int, with_top: bool) -> None:
        self._tokenizer, self._offset, self._with_top = tokenizer, offset, with_top

    def part(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens."""
        tokens = [spelling(self._tokenizer, one[0][0]) for one in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        tops = [{spelling(self._tokenizer, i): _finite(p) for i, p in one[1:]} for one in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one[0][1]) for one in logprobs],
            "top_logprobs": tops if self._with_top else None,
            "text_offset": offsets,
        }


def spelling(tokenizer: ChatTokenizer, token_id: int) -> str:
    """A token as text; part of a character shows as U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def token_bytes(tokenizer: ChatTokenizer, token_id: int) -> list[int]:
    """A token's bytes, also where they are part of a character."""
    text = spelling(tokenizer, token_id)
    if REPLACEMENT not in text:
        return list(text.encode())
    letters, known = tokenizer.id_to_token(token_id) or "", _byte_letters()
    found = [known.get(letter, ord(letter)) for letter in letters]  # a byte token may be its own letter
    return found if all(byte < 256 for byte in found) else list(text.encode())


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet of bytes, which byte-level vocabularies are written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _entry(tokenizer: ChatTokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": spelling(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": token_bytes(tokenizer, token_id),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
