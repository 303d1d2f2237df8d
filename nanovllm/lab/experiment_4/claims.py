"""Prose held to the sheet's rule: what a probe observed is never written as a gain.

What it is: a reading of sentences for words that do not go together. What it knows nothing
about: where prose comes from. Invariants: a sentence that speaks of the probe or of prefix
hits, and of a gain, must deny it; what it finds is shown to a person with the sentence. It reads words, not
meaning: a claim made in other words passes, a denial made in other words is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PROBE = re.compile(
    r"探针|前缀命中|前缀重叠|潜在重叠|命中率|\bprobe|\bprefix[- ]?(hit|overlap)|\boverlap\b|\bhit rate", re.I
)
GAIN = re.compile(
    r"收益|提升|加速|节省|省下|减少了|降低了|更快|提高|\bgain|\bspeed-?up|\bsav(e|es|ed|ing)|\bfaster|\bimprov|\breduc",
    re.I,
)
DENIAL = re.compile(
    r"不是|并非|没有|不能|不代表|尚未|还未|未兑现|不可|不等于|不表示|无法|不应|不得|不写|"
    r"\bnot\b|\bno\b|n't\b|\bnever\b|\bnor\b|\bnone\b|\bcannot\b|\bwithout\b",
    re.I,
)
SENTENCE = re.compile(r"[。！？；;!?\n|]|\.(?=\s|$)")


def gains_of_a_probe(text: str) -> Iterator[str]:
    """Sentences that claim what a probe cannot show."""
    for sentence in SENTENCE.split(text):
        if PROBE.search(sentence) and GAIN.search(sentence) and not DENIAL.search(sentence):
            yield sentence.strip()


def speaks_of_a_probe(text: str) -> bool:
    """Whether a probe's figure is named and not denied."""
    return any(PROBE.search(sentence) and not DENIAL.search(sentence) for sentence in SENTENCE.split(text))
