"""Reading a Hugging Face tokenizer directory into the parts of a Tokenizer.

What it is: one function, `read`. What it knows nothing about: encoding. Invariant:
files are size-checked JSON; the chat template comes from chat_template.jinja, else
chat_template.json, else tokenizer_config.json, as transformers prefers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from nanovllm.errors import ModelFileError
from nanovllm.models.chat_template import MAX_TEMPLATE_CHARS
from nanovllm.models.json_file import MAX_JSON_BYTES, read_json

_TEMPLATE_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def read(directory: Path) -> dict[str, Any]:
    """Keyword arguments for Tokenizer. Raises ModelFileError for absent or malformed files."""
    config = read_json(directory / "tokenizer_config.json", missing={})
    special = read_json(directory / "special_tokens_map.json", missing={}) | config
    tokens = {name: _spelling(special.get(name)) for name in _TEMPLATE_TOKENS}
    add_bos = config.get("add_bos_token")
    return {
        "backend": _backend(directory / "tokenizer.json"),
        "bos_token": tokens["bos_token"],
        "eos_token": tokens["eos_token"],
        "add_bos": add_bos if isinstance(add_bos, bool) else None,
        "chat_template": _chat_template(directory, config),
        "variables": {name: spelling for name, spelling in tokens.items() if spelling is not None},
    }


def _backend(file: Path) -> Backend:
    if not file.is_file():
        raise ModelFileError(
            f"{file.parent} has no tokenizer.json.",
            param=str(file),
            hint="Save the model's fast tokenizer there (tokenizer.json); other formats are not read.",
        )
    if file.stat().st_size > MAX_JSON_BYTES:
        raise _bad(file, f"it exceeds {MAX_JSON_BYTES} bytes")
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever serde dislikes
        raise _bad(file, str(error)[:200]) from error


def _spelling(token: Any) -> str | None:
    """A token is written as a string or as an object with `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return _template_text(jinja)
    template = read_json(directory / "chat_template.json", missing={}).get("chat_template")
    template = config.get("chat_template") if template is None else template
    if isinstance(template, list):  # several named templates: "default" is the conversation's
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise _bad(directory / "tokenizer_config.json", "chat_template is not a string")
    return template


def _template_text(file: Path) -> str:
    try:
        if file.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            raise _bad(file, "it is too long for a template")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(file, str(error)) from error


def _bad(file: Path, problem: str) -> ModelFileError:
    return ModelFileError(f"{file.name} is not usable: {problem}.", param=str(file), hint="Download it again.")
