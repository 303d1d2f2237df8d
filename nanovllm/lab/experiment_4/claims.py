"""Prose held to the sheet's rule: what a probe observed is never written as a gain.

What it is: a reading of sentences for words that do not go together. What it knows nothing
about: where prose comes from. Invariants: a sentence that speaks of the probe or of prefix
hits, and of a gain, must deny it, and the denial must stand at that gain ("not a realised gain", "不是收益"): one
elsewhere in the sentence counts for nothing, and of two gains each needs its own. What it finds is shown to a person
with the sentence. It reads words, not meaning: a claim in other words, or over two sentences, passes; a denial in other
words is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PROBE = re.compile(
    r"探针|前缀(的)?(命中|重叠|复用|共享|缓存)|(共享|共同|相同)(的)?前缀|缓存命中|潜在重叠|重叠率|命中率|"
    r"\bprobe|\bprefix(es)?[- ]?(hit|overlap|reuse|cach|shar)|\bshared prefix|\boverlap|\b(cache )?hits?\b",
    re.I,
)
GAIN = re.compile(
    r"收益|提升|提高|加速|加快|更快|变快|快了|节省|节约|省下|省去|省了|缩短|下降|降低|降至|降到|降了|减少|减小|减半|减轻|翻倍|翻番|"
    r"倍增|改善|优化了|少用|少等|"
    r"\bgain|\bspe(e)?d(s|ed)?[- ]?up|\bsav(e|es|ed|ing|ings)\b|\bfaster|\bquicker|\bcheaper|\bshorter|\bshorten|"
    r"\bimprov|\breduc|\bdrop(s|ped|ping)?\b|\bcut(s|ting)?\b|\bhalv|\bdoubl|\bfalls?\b|\bfell\b|\bdecreas|"
    r"\blower(s|ed|ing)?\b(?! bound)|\bboost|\baccelerat|\bbenefit|\bspares?\b|\bspared\b",
    re.I,
)
EMPTY = re.compile(  # they deny nothing
    r"毫无疑问|没有疑问|无疑|不容置疑|毋庸置疑|不可否认|不能否认|不得不|不能不|不仅|不只|不但|不光|不是白|不白|没有白|不是没有|并非没有|"
    r"\bno (doubt|question|wonder)|\bnot (only|just|merely|for nothing|without|in vain)|\bcannot (be )?den(y|ied)|"
    r"\bwithout (any )?(a )?(doubt|question)|\bnever (before|so)",
    re.I,
)
NOT = r"(?:\bnot|\bno|n't|\bnever|\bnor|\bneither|\bnone|\bcannot|\bwithout|\bnothing)"
SHOWS = r"(?:show|call|prove|mean|imply|claim|say|tell|demonstrate|establish|support|read|counts?|written|taken)"
FILLER = (
    r"(?:a|an|any|the|of|as|in|to|be|been|yet|it|that|which|such|real|realised|realized|actual|measured|reuse|time|or)"
)
BEFORE = re.compile(  # what ends right where the gain begins
    rf"{NOT}\s+(?:{FILLER}\s+){{0,5}}$|{NOT}\s+(?:\w+\s+)?{SHOWS}s?\b(?:\s+[\w'-]+){{0,8}}\s+$|"
    r"(?:不是|并非|没有|不能|不代表|尚未|还未|未|不可|不等于|不表示|不说明|不意味|无法|不应|不得|不会|不写|不把|不要|绝不|不算|无|≠)"
    r"[^，,。：:、！？但却而]{0,20}$",
    re.I,
)
AFTER = re.compile(  # what begins right where the gain ends
    r"^\w*\s+(?:is|are|was|were|has|have|had|did)(?:\s+\w+)?\s*(?:not|n't|never)\b|"
    r"^(?:都|也)?(?:尚未|还未|并未|未兑现|未测|没有(?:兑现|测)|不存在|与[^，。]{0,8}无关)",
    re.I,
)
SENTENCE = re.compile(r"[。！？；;!?\n|]|\.(?=\s|$)")


def gains_of_a_probe(text: str) -> Iterator[str]:
    """Sentences that claim what a probe cannot show."""
    for sentence in SENTENCE.split(text):
        if PROBE.search(sentence) and not all(_is_denied(EMPTY.sub("", sentence))):
            yield sentence.strip()


def _is_denied(sentence: str) -> Iterator[bool]:
    """For each gain of a sentence whether a denial stands at it."""
    for gain in GAIN.finditer(sentence):
        before, after = sentence[: gain.start()], sentence[gain.end() :]
        yield BEFORE.search(before) is not None or AFTER.search(after) is not None


def speaks_of_a_probe(text: str) -> bool:
    """Whether a probe's figure is named and no gain of it denied."""
    for sentence in SENTENCE.split(text):
        denied = list(_is_denied(EMPTY.sub("", sentence)))
        if PROBE.search(sentence) and not (denied and all(denied)):
            return True
    return False
