"""The prose that labs print and write, in English and Chinese, from one table.

What it is: sentences with named places to fill. What it knows nothing about: who prints
them. Invariants: both languages have the same keys and the same places; identifiers,
columns, terms and labels stay English in both, but for the column the sheet itself calls 解释.
"""

from __future__ import annotations

from types import MappingProxyType

from nanovllm.observe.wording import Lang

__all__ = ["PROSE", "Lang", "say"]

_PROSE = {
    "rule_manifest": ("{where}: the manifest was edited after the run", "{where}：manifest 在运行后被改动"),
    "rule_status": (
        "{where}: the run's status is {found}: no evidence of a whole run",
        "{where}：运行状态为 {found}，不是完整运行的证据",
    ),
}
PROSE = MappingProxyType(_PROSE)


def say(lang: Lang, key: str, **places: object) -> str:
    """The sentence `key` in `lang`, its places filled."""
    return PROSE[key][lang == "zh"].format(**places)
