"""Tokenizer: ids equal transformers', BOS is single, foreign input is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import byte_vocabulary
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers, processors

from nanovllm.errors import InvalidRequestError, ModelFileError, NanoVLLMError, UnsupportedModelError
from nanovllm.models.byte_tokenizer import ByteTokenizer
from nanovllm.models.gguf_loader import GGUFSource
from nanovllm.models.tokenizer import Tokenizer
from nanovllm.models.tokenizer_gguf import _SPLITS

STRINGS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\ttabs ",
    "don't we'll I'M",
    "é ü ñ ß — “quotes” …",
    "日本語のテキスト",
    "🙂👩‍👩‍👧 \U0001f3f4",
    "def f(x):\n    return x ** 2\n",
    "\0\x01\x7f",
    "a\u0301 vs á",
    "<|im_start|>user\nhi<|im_end|>",
    "<|im_start|><|im_start|>",
    "<|im_ start|>",
    "مرحبا بالعالم",
    "1234567890 3.14159 1,000,000",
    "x" * 2000,
]
# SmolLM2's vocabulary lacks some control bytes and the lead bytes of high planes: such text cannot come back.
SPELLABLE = st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x1FFFF), max_size=60)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def smol(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFSource(smollm2_path).metadata)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    """transformers' tokenizer, with the digit splitting of SmolLM2's own tokenizer.json.

    transformers does not know GGUF's pre-tokenizer "smollm" and falls back to GPT-2's.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.parametrize("text", STRINGS, ids=range(len(STRINGS)))
def test_ids_equal_transformers(smol: Tokenizer, reference: Any, text: str) -> None:
    ids = smol.encode(text)
    assert ids == reference.encode(text)
    assert smol.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert smol.decode(ids, skip_special_tokens=False) == text == reference.decode(ids)


@settings(max_examples=300, deadline=None)
@given(UNICODE)
def test_any_text_equals_transformers(smol: Tokenizer, reference: Any, text: str) -> None:
    ids = smol.encode(text)
    assert ids == reference.encode(text)
    assert smol.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@settings(max_examples=200, deadline=None)
@given(SPELLABLE)
def test_text_comes_back(smol: Tokenizer, text: str) -> None:
    for tokenizer in (smol, ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False), skip_special_tokens=False) == text


def test_attributes(smol: Tokenizer) -> None:
    assert (smol.vocab_size, smol.bos_token_id, smol.eos_token_id) == (49152, 1, 2)
    assert {0, 1, 2} <= smol.special_ids and len(smol.special_ids) == 17
    assert smol.id_to_token(2) == "<|im_end|>" and smol.id_to_token(10**6) is None
    assert smol.decode([10**6, 1]) == ""
    assert "im_start" in smol.chat_template


SPECIAL = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "end|>"])
WITH_SPECIALS = st.lists(SPELLABLE | SPECIAL, max_size=6).map("".join)


@settings(max_examples=200, deadline=None)
@given(WITH_SPECIALS)
def test_unparsed_specials_are_text(smol: Tokenizer, text: str) -> None:
    for tokenizer in (smol, ByteTokenizer()):
        ids = tokenizer.encode(text, parse_special=False, add_bos=False)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates(smol: Tokenizer, text: str) -> None:
    for tokenizer in (smol, ByteTokenizer()):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            tokenizer.encode(text)
        with pytest.raises(InvalidRequestError, match="surrogate"):
            tokenizer.encode(text, parse_special=False)


# --- BOS ---


def _with_bos_processor(directory: Path) -> None:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(directory / "tokenizer.json"))


def _set(directory: Path, **settings: Any) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("flag", [True, False, None])
def test_bos_is_never_doubled(tiny_directory: Path, processor: bool, flag: bool | None) -> None:
    if processor:
        _with_bos_processor(tiny_directory)
    _set(tiny_directory, add_bos_token=flag)
    tokenizer = Tokenizer.from_directory(tiny_directory)
    adds = processor if flag is None else flag
    plain = tokenizer.encode("hi", add_bos=False)
    assert len(plain) == 2
    assert tokenizer.encode("hi") == ([256] if adds else []) + plain
    assert tokenizer.encode("<s>hi") == [256, *plain]
    assert tokenizer.encode("<s><s>hi") == [256, 256, *plain]  # what the user wrote twice stays twice
    assert tokenizer.encode("") == ([256] if adds else [])
    literal = tokenizer.encode("<s>", parse_special=False)
    assert literal.count(256) == adds and tokenizer.decode(literal) == "<s>"


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é<|eos|>") == [256, 0xC3, 0xA9, 257]
    assert tokenizer.encode("<|bos|>a") == [256, 97]
    assert tokenizer.decode([256, 0xC3, 97, 257]) == "\ufffda"
    assert tokenizer.decode([97, 257], skip_special_tokens=False) == "a<|eos|>"
    assert (tokenizer.vocab_size, tokenizer.id_to_token(258), tokenizer.id_to_token(260)) == (
        260,
        "<|im_start|>",
        None,
    )


# --- files ---


def test_directory_equals_transformers(tiny_directory: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tiny_directory / "tokenizer.json"))
    ours = Tokenizer.from_directory(tiny_directory)
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (260, 256, 257)


def test_template_files_by_precedence(tiny_directory: Path) -> None:
    def template() -> str | None:
        return Tokenizer.from_directory(tiny_directory).chat_template

    _set(
        tiny_directory,
        chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    )
    assert template() == "d"
    (tiny_directory / "chat_template.json").write_text('{"chat_template": "j"}')
    assert template() == "j"
    (tiny_directory / "chat_template.jinja").write_text("x")
    assert template() == "x"


def test_special_tokens_map_is_a_fallback(tiny_directory: Path) -> None:
    (tiny_directory / "tokenizer_config.json").write_text("{}")
    (tiny_directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    tokenizer = Tokenizer.from_directory(tiny_directory)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template) == (259, None, None)


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"model": {"type": "Nope"}}', "\xff"])
def test_bad_tokenizer_files(tiny_directory: Path, content: str) -> None:
    (tiny_directory / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tiny_directory)
    (tiny_directory / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tiny_directory)


def _metadata(**change: Any) -> dict[str, Any]:
    base = {"model": "gpt2", "pre": "gpt-2", "tokens": byte_vocabulary(), "token_type": [1] * 256 + [3] * 4}
    return {f"tokenizer.ggml.{key}": value for key, value in (base | {"merges": []} | change).items()}


def test_gguf_kinds_are_refused_by_name() -> None:
    for change in ({"model": "llama"}, {"model": "bert"}, {"pre": "chatglm-bpe"}):
        with pytest.raises(UnsupportedModelError, match=next(iter(change.values()))):
            Tokenizer.from_gguf(_metadata(**change))


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_pre_tokenizers(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(_metadata(pre=pre, bos_token_id=256))
    for text in STRINGS:
        expected = text.replace("a\u0301", "á") if pre == "qwen2" else text  # Qwen normalises to NFC
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False), skip_special_tokens=False) == expected
    assert tokenizer.encode("x")[0] == (256 if pre == "llama-bpe" else tokenizer.encode("x", add_bos=False)[0])


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_gguf_splits_equal_transformers(pre: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert _SPLITS[pre] == GGUF_PRE_TOKENIZER_SPLITS[pre]


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": []},
        {"tokens": ["a", "a"]},
        {"tokens": [1, 2]},
        {"merges": ["a b c"]},
        {"merges": ["nospace"]},
        {"merges": ["zz yy"]},
        {"token_type": [1] * 261},
        {"bos_token_id": 260},
        {"eos_token_id": "x"},
        {"add_bos_token": 3},
        {"model": None},
        {"model": 4},
    ],
    ids=str,
)
def test_bad_gguf_vocabularies(change: dict[str, Any]) -> None:
    with pytest.raises(NanoVLLMError):
        Tokenizer.from_gguf(_metadata(**change))
