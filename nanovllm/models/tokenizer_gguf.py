"""Building a byte-level BPE tokenizer from GGUF metadata.

What it is: one function, `build`. What it knows nothing about: encoding, files.
Invariant: a pre-tokenizer that is not implemented is refused by name, because a
near-miss would split text differently from the model's training. Source of the
patterns: llama.cpp's `llama-vocab.cpp`; SmolLM's and Qwen's own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from nanovllm.errors import ModelFileError
from nanovllm.models.config_limits import unsupported
from nanovllm.models.fields import Fields

_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}
_PRE_TOKENIZERS = ("default", "gpt-2", "smollm", *_SPLITS)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def build(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for Tokenizer.

    Raises UnsupportedModelError for sentencepiece and unknown pre-tokenizers,
    ModelFileError for an inconsistent vocabulary.
    """
    fields = Fields(metadata, "GGUF", "tokenizer.ggml.")
    kind, pre = fields.text("model"), fields.text("pre", "default")
    if kind != "gpt2":
        raise unsupported(f"GGUF tokenizer {kind!r}", "Supported is byte-level BPE ('gpt2').")
    if pre not in _PRE_TOKENIZERS:
        raise unsupported(f"GGUF pre-tokenizer {pre!r}", f"Supported are {', '.join(_PRE_TOKENIZERS)}.")
    tokens = _strings(fields, "tokens")
    backend = _bpe(tokens, _strings(fields, "merges"), whole_words=pre in _LLAMA3_NAMES)
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(_added_tokens(fields, tokens))
    return {
        "backend": backend,
        "bos_token": _token(fields, tokens, "bos_token_id"),
        "eos_token": _token(fields, tokens, "eos_token_id"),
        "add_bos": fields.boolean("add_bos_token", pre in _LLAMA3_NAMES),
        "chat_template": Fields(metadata, "GGUF").text("tokenizer.chat_template", None),
    }


def _strings(fields: Fields, key: str) -> list[str]:
    values = fields.raw(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise fields.bad(key, values, "a list of strings")
    return values


def _bpe(tokens: list[str], merges: list[str], *, whole_words: bool) -> Backend:
    """`whole_words`: a word that is itself a token skips the merges, as Llama 3's vocabulary expects."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not tokens or len(vocabulary) != len(tokens):
        raise ModelFileError(
            "The GGUF vocabulary is empty or lists a token twice.",
            param="tokenizer.ggml.tokens",
            hint="Convert the model again.",
        )
    try:
        pairs = [(m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]) for m in merges]
        return Backend(BPE(vocabulary, pairs, ignore_merges=whole_words))
    except Exception as error:  # ValueError of ours, or the library's bare Exception for a foreign merge
        raise ModelFileError(
            f"The GGUF merges do not fit the vocabulary: {str(error)[:120]}.",
            param="tokenizer.ggml.merges",
            hint="Convert the model again.",
        ) from error


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _added_tokens(fields: Fields, tokens: list[str]) -> list[AddedToken]:
    """Tokens matched whole in the text: control tokens (special) and user-defined ones."""
    types = fields.raw("token_type", [])
    if not isinstance(types, list) or len(types) > len(tokens):
        raise fields.bad("token_type", types, "a list of integers, one per token")
    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]


def _token(fields: Fields, tokens: list[str], key: str) -> str | None:
    token_id = fields.integer(key, None, low=0)
    if token_id is not None and token_id >= len(tokens):
        raise fields.bad(key, token_id, f"below the vocabulary's size {len(tokens)}")
    return None if token_id is None else tokens[token_id]
