"""Paired text and skeletons: what cannot be right is refused, by the line that is wrong."""

from __future__ import annotations

import pytest
from paired import split
from skeleton import hollow, signatures

PAIRED = "<!-- en -->\n# A {{x}}\n<!-- zh -->\n# 甲 {{x}}\n<!-- both -->\n`code`\n"
SOLUTION = '''class Counter:
    def on_event(self, event: dict) -> None:
        """Doc."""
        # BEGIN SOLUTION one
        # PROMPT a hint / 提示
        if event:
            self.seen = 1
        # END SOLUTION

    def _hidden(self) -> None: ...
'''


def test_both_languages_from_one_text() -> None:
    assert split(PAIRED, {"x": "7"}) == {"en": "# A 7\n`code`\n", "zh": "# 甲 7\n`code`\n"}


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("text", "begins with a mark"),
        ("before\n" + PAIRED, "begins with a mark"),
        ("<!-- en -->\na\n", "do not alternate"),
        ("<!-- zh -->\na\n", "do not alternate"),
        ("<!-- en -->\na\n<!-- both -->\nb\n<!-- zh -->\nc\n", "do not alternate"),
        ("<!-- en -->\n# a\n<!-- zh -->\nb\n", "1 headings in English, 0 in Chinese"),
        ("<!-- en -->\n| a |\n<!-- zh -->\n| b |\n| c |\n", "table rows"),
        ("<!-- en -->\n- a\n<!-- zh -->\nb\n", "items"),
        ("<!-- en -->\n```\n```\n<!-- zh -->\n\n", "fences"),
        ("<!-- both -->\n{{y}}\n", "nothing is known as {{y}}"),
    ],
)
def test_languages_that_do_not_match_are_refused(source: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        split(source, {"x": "1"})


def test_a_body_becomes_its_hints_and_an_error_that_names_the_task() -> None:
    left = hollow(SOLUTION, "task 4")
    body = left.split('"""Doc."""\n')[1].split("\n\n")[0]
    assert body == ('        # TODO one\n        # a hint / 提示\n        raise NotImplementedError("task 4 (one)")')
    assert signatures(left) == ["class Counter", "def Counter.on_event(self, event: dict)"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("        # END SOLUTION\n", ""), "not closed"),
        (("        # BEGIN SOLUTION one\n", ""), "did not begin"),
        (("# PROMPT a hint / 提示", "# BEGIN SOLUTION two"), "nested or named twice"),
        (("        # END SOLUTION", "    # END SOLUTION"), "did not begin"),
        (("    def _hidden", "    # BEGIN SOLUTION one\n    # END SOLUTION\n    def _hidden"), "named twice"),
        (("class", "# BEGIN SOLUTION zero\n# END SOLUTION\nclass"), None),
    ],
)
def test_bad_marks_are_refused(change: tuple[str, str], word: str | None) -> None:
    source = SOLUTION.replace(*change)
    if word is None:
        assert "zero" in hollow(source, "task")
        return
    with pytest.raises(ValueError, match=word):
        hollow(source, "task")


def test_a_solution_that_hides_a_function_is_refused() -> None:
    source = SOLUTION.replace("            self.seen = 1\n", "            pass\n    def more(self) -> None: ...\n")
    with pytest.raises(ValueError, match="signatures"):
        hollow(source, "task")
