"""Findings: what a check of a bundle found, and two documents compared leaf by leaf.

What it is: the frame that checks of all experiments share. What it knows nothing about:
rules. Invariants: a finding names the rule it breaks and where; a verdict is `pass` only
without findings; a rule that was not evaluated neither holds nor is broken; two documents
are equal only where every leaf is, in value and in type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanovllm.lab.wording import say
from nanovllm.observe.wording import Lang

MISSING = "(missing)"


class Finding(NamedTuple):
    """One broken rule. `found` and `wanted` are shown to a person; one that begins with `why_` names a sentence."""

    rule: str
    where: str
    found: str = ""
    wanted: str = ""

    def text(self, lang: Lang) -> str:
        """What is wrong, in one sentence."""
        found, wanted = (say(lang, text) if text.startswith("why_") else text for text in (self.found, self.wanted))
        return say(lang, f"rule_{self.rule}", where=self.where, found=found, wanted=wanted).rstrip()


@dataclass
class Verdict:
    """All findings of one bundle, and what was looked at."""

    experiment: int
    bundle: str
    rules: tuple[str, ...]
    findings: list[Finding] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)  # rules for which there was nothing that could be evaluated

    @property
    def is_pass(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def broken(self) -> set[str]:
        """The rules that are broken."""
        return {finding.rule for finding in self.findings}

    def outcomes(self) -> dict[str, bool | None]:
        """By rule: whether it holds; None where it was not evaluated."""
        broken = self.broken()
        return {rule: False if rule in broken else None if rule in self.skipped else True for rule in self.rules}

    def as_dict(self, lang: Lang) -> dict[str, Any]:
        """Plain data."""
        return {
            "experiment": self.experiment,
            "bundle": self.bundle,
            "verdict": "pass" if self.is_pass else "fail",
            "rules": self.outcomes(),
            "findings": [{**f._asdict(), "text": f.text(lang)} for f in self.findings],
        }


def differences(found: Any, wanted: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(where, found, wanted) for every leaf in which two JSON documents differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(found.get(key, MISSING), wanted.get(key, MISSING), inner)
    elif isinstance(found, list) and isinstance(wanted, list):
        for index in range(max(len(found), len(wanted))):
            ours, theirs = (part[index] if index < len(part) else MISSING for part in (found, wanted))
            yield from differences(ours, theirs, f"{path}[{index}]")
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        yield path, found, wanted
