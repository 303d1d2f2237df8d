"""What the requests of a benchmark ask: seeded prompts, or those of a file.

What it is: plain data made before the run. What it knows nothing about: tokenizers,
so a length in words is only about one in tokens; the report shows what the server
counted. Invariants: the same seed gives the same prompts, and the first n of a
longer run are those of a shorter one; warm-up prompts are never measured ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidRequestError

# Short and frequent: one token each, with its space, in the vocabularies in use (a byte tokenizer makes about four).
_TEXT = (
    "the of and to in is it you that he was for on are with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use how said an each she which do their time if will way "
    "about many then them write would like so these her long make thing see him two has look more day could go come "
    "did no most my over know than call first who may down side been now find any new work part take get place made "
    "live where after back little only round man year came show every good me give our under name"
)
WORDS = tuple(_TEXT.split())
MAX_FILE_BYTES = 2**28


@dataclass(frozen=True)
class Prompt:
    """One request's input: text, token ids, or messages of a conversation; and how much to answer."""

    content: str | list[int] | list[dict[str, Any]]
    output_len: int


@dataclass(frozen=True)
class Shape:
    """How long made-up prompts and their answers are. Lengths are uniform within len * (1 +- range_ratio).

    `prefix_len` words are shared by all and come before the `input_len` of each. With `vocab`, words are
    token ids below it, so that lengths in tokens are exact; the completions endpoint takes those.
    """

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    vocab: int | None = None


def made_up(shape: Shape, seed: int, purpose: str = "run") -> Iterator[Prompt]:
    """Prompts without end. Another `purpose` shares nothing with the first but the prefix."""
    words: Any = WORDS if shape.vocab is None else range(shape.vocab)
    prefix = random.Random(f"{seed}/prefix").choices(words, k=shape.prefix_len)  # noqa: S311  load, no secret
    draw = random.Random(f"{seed}/{purpose}")  # noqa: S311
    while True:
        input_len, output_len = (_near(draw, length, shape) for length in (shape.input_len, shape.output_len))
        content = prefix + draw.choices(words, k=input_len)
        yield Prompt(content if shape.vocab is not None else " ".join(content), output_len)


def _near(draw: random.Random, length: int, shape: Shape) -> int:
    spread = int(length * shape.range_ratio)
    return max(1, draw.randint(length - spread, length + spread))


def from_file(path: Path, output_len: int) -> list[Prompt]:
    """One prompt a line: plain text, a JSON string, or an object with `prompt` or `messages` and maybe `max_tokens`."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequestError(f"{path} has more than {MAX_FILE_BYTES} bytes.", param="prompts")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidRequestError(f"{path} cannot be read: {why}.", param="prompts") from None
    found = [_line(line, f"{path}:{at}", output_len) for at, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidRequestError(f"{path} holds no prompt.", param="prompts")
    return found


def repeated(prompts: list[Prompt], count: int) -> list[Prompt]:
    """The first `count`, from the beginning again where there are fewer."""
    return list(islice(cycle(prompts), count))


def _line(line: str, where: str, output_len: int) -> Prompt:
    value = _parsed(line, where)
    if not isinstance(value, dict):
        return Prompt(value if isinstance(value, str) else line, output_len)
    content = value.get("messages", value.get("prompt"))
    length = value.get("max_tokens", output_len)
    if not content or not isinstance(content, str | list) or isinstance(length, bool) or not isinstance(length, int):
        raise InvalidRequestError(f"{where} needs prompt or messages; max_tokens is an integer.", param="prompts")
    if length < 1:
        raise InvalidRequestError(f"{where}: max_tokens must be at least 1.", param="prompts")
    return Prompt(content, length)


def _parsed(line: str, where: str) -> Any:
    """JSON where the line is JSON; an object that is broken is refused, any other text is itself."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        if line.lstrip().startswith("{"):
            raise InvalidRequestError(f"{where} begins like a JSON object and is none.", param="prompts") from None
        return line
