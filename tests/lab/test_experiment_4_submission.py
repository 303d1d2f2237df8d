"""What `lab check 4 --submission` asks of a student: a complete one passes, and each part left out is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.lab.experiment_4.check import check_bundle
from nanovllm.lab.experiment_4.submission import RULES, count_characters, has_symbol, parts_of, table
from nanovllm.lab.experiment_4.template import DRAFT_MARKS, render
from nanovllm.lab.wording import PROSE
from tests.lab.mending import edit_json, reseal

OBJECTS = (
    "`nanovllm/engine/block_manager.py::BlockManager.allocate`",
    "`nanovllm/engine/sequence.py::Sequence.append_token`",
    "`nanovllm/engine/block_manager.py::BlockManager.deallocate`",
    "`nanovllm/engine/sequence.py::Sequence`",
)
SENTENCE = "长上下文的请求在池中驻留的状态更大，同一块数能同时存活的请求更少，其余请求只能排队等待，TTFT 随之变差。"
ANALYSIS = SENTENCE * 12
ENGLISH = "Long prompts hold more resident state, so fewer requests run at once and the others wait in the queue. " * 20


def filled(text: str, analysis: str = ANALYSIS) -> str:
    """The template as a diligent student hands it in."""
    for mark in DRAFT_MARKS:
        text = text.replace(f"{mark} ", "")
    lines = text.splitlines()
    objects = iter(OBJECTS)
    for i, line in enumerate(lines):
        if line.startswith(("| 姓名", "| 学号")):
            lines[i] = line.replace("|  |", "| 张三 |")
        elif re.match(r"\| (prefill 产生|decode 读取|完成后|状态绑定)", line):
            lines[i] = line.replace("|  |", f"| {next(objects)} |")
        elif line.startswith("| 选择的是"):
            lines[i] = "| 选择的是 | 状态统计器 |"
        elif line.startswith(("| 实现位置", "| 观测结论")):
            lines[i] = line.replace("|  |", "| counter.py:Counter，最多 2 个请求存活 |")
    return "\n".join(lines) + f"\n{analysis}\n"


@pytest.fixture
def submission(bundle: Path) -> Path:
    """A bundle with a complete submission."""
    path = bundle / "submission.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def edited(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert re.search(old, text, re.M), old
        return re.sub(old, new, text, count=1, flags=re.M)

    return edit


MUTATIONS: list[tuple[str, Callable[[str], str], set[str]]] = [
    ("no name", edited(r"^\| 姓名.*$", "| 姓名 / 组员 | |"), {"identity"}),
    ("no identity at all", edited(r"(?s)## 12\.1.*?(?=## 12\.2)", ""), {"identity"}),
    ("no basis", edited(r"^(\| decode .*\|)[^|]+\|$", r"\1 |"), {"lifecycle"}),
    ("an unknown symbol", edited("BlockManager.deallocate", "BlockManager.vanish"), {"lifecycle"}),
    (
        "a file outside",
        edited("nanovllm/engine/sequence.py::Sequence`", "../../etc/passwd.py::Sequence`"),
        {"lifecycle"},
    ),
    ("a changed figure", edited(r"370\.2 ms", "37.2 ms"), {"cell"}),
    ("a missing row", edited(r"^\| long_ctx .*\n", ""), {"cell"}),
    ("no explanation", edited(r"^(\| short_ctx .*\|)[^|]+\|$", r"\1 |"), {"explanation"}),
    ("no chain", edited(r"(?s)## 12\.4.*?(?=## 12\.5)", "## 12.4 因果链\n\n上下文变化 -> TTFT\n\n"), {"chain_text"}),
    ("both extensions", edited("状态统计器", "状态统计器 / 仅用于观测的前缀命中探针"), {"extension"}),
    ("the other extension", edited("选择的是 . 状态统计器", "选择的是 | 前缀命中探针"), {"extension"}),
    ("no conclusion", edited(r"^\| 观测结论.*$", "| 观测结论 | |"), {"extension"}),
    ("no result", edited(r"^\| 还不能.*$", "| 还不能 | |"), {"result"}),
    (
        "a probe as a real gain",
        edited(r"^\| 可以当作真实收益.*$", "| 可以当作真实收益 | 探针看到 61% 的重叠 |"),
        {"probe"},
    ),
    ("a probe praised", edited(SENTENCE, "前缀命中节省了一半时间。" + SENTENCE), {"probe"}),
    ("too short", edited(f"({SENTENCE}){{5}}", ""), {"analysis"}),
    ("too long", edited(SENTENCE, SENTENCE * 8), {"analysis"}),
    ("a draft mark", edited(SENTENCE, f"{DRAFT_MARKS[0]} {SENTENCE}"), {"draft"}),
    (
        "memory alone",
        lambda text: text.replace(SENTENCE, "KV 很大，占了很多显存和很多块，显存快满了，块也快用完了。" * 2),
        {"scope"},
    ),
]


def test_a_complete_submission_passes(submission: Path) -> None:
    verdict = check_bundle(submission.parent, handed_in=True)
    assert verdict.is_pass, [finding.text("zh") for finding in verdict.findings]
    assert set(RULES) <= set(verdict.rules)


@pytest.mark.parametrize(("change", "rules"), [row[1:] for row in MUTATIONS], ids=[row[0] for row in MUTATIONS])
def test_what_is_missing_or_wrong_is_named(submission: Path, change: Callable[[str], str], rules: set[str]) -> None:
    submission.write_text(change(submission.read_text(encoding="utf-8")), encoding="utf-8")
    verdict = check_bundle(submission.parent, handed_in=True)
    assert verdict.broken() == rules, [finding.text("zh") for finding in verdict.findings]


def test_a_fresh_bundle_is_not_yet_a_submission(whole_bundle: Path) -> None:
    verdict = check_bundle(whole_bundle, handed_in=True)
    assert {"identity", "lifecycle", "extension", "analysis", "draft"} <= verdict.broken()
    assert check_bundle(whole_bundle).is_pass


def test_a_probe_needs_its_statement_and_an_observer_that_ran(submission: Path) -> None:
    text = submission.read_text(encoding="utf-8").replace("| 选择的是 | 状态统计器 |", "| 选择的是 | 前缀命中探针 |")
    bare = re.sub(r"^\| (只是观测信号|还不能).*$", r"| \1 | TTFT |", text, flags=re.M)
    submission.write_text(bare, encoding="utf-8")
    assert check_bundle(submission.parent, handed_in=True).broken() == {"extension", "probe_statement"}
    submission.write_text(text, encoding="utf-8")  # which says so under 12.6
    edit_json(submission.parent / "tables.json", lambda tables: tables.update(observer=None))
    reseal(submission.parent)
    verdict = check_bundle(submission.parent, handed_in=True)
    assert [finding.found for finding in verdict.findings] == ["why_no_observer"]


def test_rules_have_their_words() -> None:
    assert {rule for *_, rules in MUTATIONS for rule in rules} | {"probe_statement"} >= set(RULES)
    assert all(f"rule_{rule}" in PROSE and f"list_{rule}" in PROSE for rule in RULES)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_template_has_the_sheets_parts_in_either_language(lang: str) -> None:
    text = render(lang)  # type: ignore[arg-type]
    parts = parts_of(text)
    assert list(parts) == ["12.1", "12.2", "12.3", "12.4", "12.5", "12.6", "analysis"]
    assert [len(table(parts[name])) for name in ("12.1", "12.2", "12.3", "12.5", "12.6")] == [4, 4, 3, 3, 3]
    assert not any(mark in text for mark in DRAFT_MARKS)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", (0, "字")),
        ("状态驻留", (4, "字")),
        ("TTFT 变差 12.5 ms", (3, "words")),
        ("等待 TTFT 上升", (5, "字")),
        ("it's two", (2, "words")),
    ],
)
def test_lengths_are_counted_in_characters_or_words(text: str, length: tuple[int, str]) -> None:
    assert count_characters(text) == length


def test_an_english_analysis_is_counted_in_words(submission: Path) -> None:
    text = submission.read_text(encoding="utf-8").replace(ANALYSIS, ENGLISH)
    submission.write_text(text, encoding="utf-8")
    assert count_characters(ENGLISH)[1] == "words"
    assert check_bundle(submission.parent, handed_in=True).is_pass


@pytest.mark.parametrize(
    ("file", "symbol", "is_there"),
    [
        ("nanovllm/engine/sequence.py", "Sequence.block_table", True),
        ("nanovllm/engine/block_manager.py", "BlockManager.hash_blocks", True),
        ("nanovllm/engine/block_manager.py", "Nothing", False),
        ("nanovllm/engine/block_manager.py", "BlockManager.allocate.inside", False),
        ("/etc/passwd", "Sequence", False),
        ("nanovllm/../../x.py", "Sequence", False),
    ],
)
def test_symbols_are_looked_up_and_nothing_is_imported(file: str, symbol: str, is_there: bool) -> None:
    assert has_symbol(file, symbol) == is_there
