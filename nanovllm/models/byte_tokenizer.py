"""The tokenizer of the built-in tiny models: one token per UTF-8 byte, and four control tokens.

What it is: a complete tokenizer without files. What it knows nothing about: models.
Invariant: decode(encode(text)) == text for any Unicode text without control spellings.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.models.chat_tokenizer import ChatTokenizer, check_unicode

SPECIAL_TOKENS = {"<|bos|>": 256, "<|eos|>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
CHATML = (  # begins with the BOS that encode() gives a plain text, so that both roads give the same tokens
    "<|bos|>{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ByteTokenizer(ChatTokenizer):
    """Ids 0..255 are bytes, 256..259 the control tokens of `SPECIAL_TOKENS`."""

    def __init__(self) -> None:
        super().__init__(SPECIAL_TOKENS, CHATML)
        self.vocab_size = 256 + len(SPECIAL_TOKENS)
        self.bos_token_id, self.eos_token_id = SPECIAL_TOKENS["<|bos|>"], SPECIAL_TOKENS["<|eos|>"]
        self._spellings = {token_id: spelling for spelling, token_id in SPECIAL_TOKENS.items()}

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = True) -> list[int]:
        check_unicode(text)
        ids = self._encode_guarded(text, "") if parse_special else list(text.encode())
        bos = SPECIAL_TOKENS["<|bos|>"]
        return [bos, *ids] if add_bos and ids[:1] != [bos] else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = (self._piece(token_id) for token_id in ids if not skip_special_tokens or token_id < 256)
        return b"".join(kept).decode(errors="replace")

    def vocabulary(self) -> list[bytes]:
        """The bytes of each token, for who compiles grammars."""
        return [self._piece(token_id) for token_id in range(self.vocab_size)]

    def id_to_token(self, token_id: int) -> str | None:
        if 0 <= token_id < 256:
            return chr(token_id)
        return self._spellings.get(token_id)

    def _piece(self, token_id: int) -> bytes:
        if 0 <= token_id < 256:
            return bytes([token_id])
        return self._spellings.get(token_id, "").encode()

    def _encode_guarded(self, text: str, sentinel: str) -> list[int]:
        check_unicode(text)
        ids: list[int] = []
        position = 0
        for match in self._special_pattern.finditer(text):
            ids += text[position : match.start()].replace(sentinel, "").encode()
            ids.append(self.special_tokens[match[0]])
            position = match.end()
        return [*ids, *text[position:].replace(sentinel, "").encode()]
