"""How much of a rendered conversation token ids from before already spell.

What it is: a walk along known ids and a rendered text at once. What it knows nothing about: templates, messages,
how text becomes ids. Invariants: the ids that are kept spell exactly the text that is passed over, a control
token only where the template wrote one; they end beside a control token, so that what follows is tokenized as if
it stood alone: an answer that ended on another control token than the template writes keeps its own ids up to there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

Decode = Callable[[Sequence[int]], str]
REPLACEMENT = "\ufffd"
_ONCE = re.compile(f"{REPLACEMENT}+")  # how many bytes that are no text make depends on where decoding began


def spelled_prefix(
    ids: Sequence[int],
    text: str,
    sentinel: str,
    *,
    specials: Mapping[int, str],
    pattern: re.Pattern[str],
    decode: Decode,
) -> tuple[int, int]:
    """How many of `ids` to keep, and where in `text` the rest begins.

    `text`: as `ChatTokenizer` guards it, forged spellings of `specials` broken by the `sentinel`.
    """
    at, kept = 0, (0, 0)
    for end, run in _runs(ids, specials):
        is_special = run[0] in specials
        found = _past_special(text, at, specials[run[0]], pattern, sentinel) if is_special else None
        found = found if is_special else _past_plain(text, at, decode(run), pattern, sentinel)
        if found is None:
            break
        at = found
        if is_special or _begins_special(text, at, pattern, sentinel):
            kept = end, at
    return kept


def _runs(ids: Sequence[int], specials: Mapping[int, str]) -> Iterator[tuple[int, Sequence[int]]]:
    """Each control token by itself, what stands between them together; with the number of ids up to its end."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] in specials or ids[end - 1] in specials:
            yield end, ids[start:end]
            start = end


def _past_special(text: str, at: int, spelling: str, pattern: re.Pattern[str], sentinel: str) -> int | None:
    found = pattern.match(text, _past_sentinels(text, at, sentinel))
    return found.end() if found is not None and found[0] == spelling else None


def _past_plain(text: str, at: int, wanted: str, pattern: re.Pattern[str], sentinel: str) -> int | None:
    """Past `wanted`, sentinels in between not counted; None where the text reads otherwise, or a control token."""
    found = pattern.search(text, at)
    end = len(text) if found is None else found.start()
    if sentinel not in wanted and REPLACEMENT not in wanted:  # nothing is guarded within, as nearly always: at once
        past = at + len(wanted)
        if past <= end and text.startswith(wanted, at):
            return past
    for letter in _ONCE.sub(REPLACEMENT, wanted):
        at = _past_sentinels(text, at, sentinel)
        if at >= end or text[at] != letter:
            return None
        at += 1
        while letter == REPLACEMENT and at < end and text[at] in (REPLACEMENT, sentinel):
            at += 1
    return at


def _past_sentinels(text: str, at: int, sentinel: str) -> int:
    while text.startswith(sentinel, at):
        at += len(sentinel)
    return at


def _begins_special(text: str, at: int, pattern: re.Pattern[str], sentinel: str) -> bool:
    at = _past_sentinels(text, at, sentinel)
    return at == len(text) or pattern.match(text, at) is not None
