"""What `lab check 4 --submission` asks of a student: a complete one passes, and each part left out is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.lab.experiment_4.analysis import count_characters, figures_cited
from nanovllm.lab.experiment_4.check import check_bundle
from nanovllm.lab.experiment_4.submission import RULES, has_symbol, parts_of, table
from nanovllm.lab.experiment_4.template import DRAFT_MARKS, render
from nanovllm.lab.wording import PROSE
from tests.course.model_submission import analysis
from tests.lab.mending import edit_json, reseal

OBJECTS = (
    "`nanovllm/engine/block_manager.py::BlockManager.allocate`",
    "`nanovllm/engine/sequence.py::Sequence.append_token`",
    "`nanovllm/engine/block_manager.py::BlockManager.deallocate`",
    "`nanovllm/engine/sequence.py::Sequence`",
)
OWN = (
    "分配与 prefill_begin 的先后，记录里看得到。",
    "每填满一块才再要一块。",
    "完成之后块数立刻恢复。",
    "每条记录都带 request_id。",
    "大家都放得下。",
    "放不下的人在等块。",
    "短的排在长的后面。",
    "上下文变长 -> 块变多 -> 同时进行的变少 -> 等待变长 -> TTFT 变差",
    "live_requests 与块数；前缀重叠是潜在重叠信号，不是真实收益",
    "无，时间是虚拟的",
    "其他机器",
)
SENTENCE = "所以能有多少请求同时进行，并不是调度器单独决定的：它只能在状态还放得下的请求里挑选。"
MEMORY = str.maketrans({"状": "数", "态": "据", "驻": "存", "并": "规", "同": "一", "等": "停", "待": "顿", "排": "停"})
LIFE = r"^(\| (?:prefill 产生|decode 读取|完成后|状态绑定)[^|]*\|)[^|]*\|"
TEST_SYMBOL = "tests/lab/test_chain.py::test_it_holds_where_the_wait_falls_and_prefill_stays"


def without_marks(text: str) -> str:
    for mark in DRAFT_MARKS:
        text = text.replace(f"{mark} ", "")
    return text


def filled(text: str, lang: str = "zh") -> str:
    """The template as a diligent student hands it in."""
    own, whole = iter(OWN), analysis(text, lang)
    lines = re.sub(r"【草稿】 [^|\n]*[^|\n ]", lambda draft: next(own), text).splitlines()
    objects = iter(OBJECTS)
    for i, line in enumerate(lines):
        if line.startswith(("| 姓名", "| 学号")):
            lines[i] = line.replace("|  |", "| 张三 |" if "姓名" in line else "| M0001 |")
        elif re.match(r"\| (prefill 产生|decode 读取|完成后|状态绑定)", line):
            lines[i] = line.replace("|  |", f"| {next(objects)} |")
        elif line.startswith("| 选择的是"):
            lines[i] = "| 选择的是 | 状态统计器 |"
        elif line.startswith(("| 实现位置", "| 观测结论")):
            lines[i] = line.replace("|  |", "| counter.py:Counter，最多 2 个请求存活 |")
    return "\n".join(lines) + f"\n{whole}\n"


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
    ("too short", edited(r"(?s)预填充本身也.*?(?=这些证据)", ""), {"analysis"}),
    (
        "one word five hundred times",
        edited(r"(?s)人们通常.*\Z", "状态并发等待 TTFT 370.2 queue 310.6 " + "字" * 500),
        {"analysis"},
    ),
    (
        "one sentence many times",
        edited(r"(?s)人们通常.*\Z", (SENTENCE + "等待 370.2 与 310.6 ms。") * 12),
        {"analysis"},
    ),
    ("no figure of the run", edited(r"370\.2 ms 中有 310\.6 ms", "123.4 ms 中有 99.9 ms"), {"figures"}),
    ("one figure of the run", edited(r"中有 310\.6 ms", "中有一半"), {"figures"}),
    ("named x", edited(r"^\| 姓名.*$", "| 姓名 / 组员 | x |"), {"identity"}),
    ("no number", edited(r"^\| 学号.*$", "| 学号 | 无 |"), {"identity"}),
    ("a test for every row", lambda text: re.sub(LIFE, rf"\1 {TEST_SYMBOL} |", text, flags=re.M), {"lifecycle"}),
    ("one symbol for every row", lambda text: re.sub(LIFE, rf"\1 {OBJECTS[0]} |", text, flags=re.M), {"lifecycle"}),
    ("too long", edited(SENTENCE, SENTENCE * 8), {"analysis"}),
    ("a draft mark", edited(SENTENCE, f"{DRAFT_MARKS[0]} {SENTENCE}"), {"draft"}),
    (
        "memory alone",
        lambda text: "".join([*text.partition("人们通常")[:2], text.partition("人们通常")[2].translate(MEMORY)]),
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


def test_drafts_without_their_marks_are_drafts(submission: Path, whole_bundle: Path) -> None:
    """Each of the eleven that a run writes, and no other rule."""
    drafts = (whole_bundle / "submission.md").read_text(encoding="utf-8")
    text = submission.read_text(encoding="utf-8")
    for ours, draft in zip(OWN, re.findall(r"【草稿】 ([^|\n]*[^|\n ])", drafts), strict=True):
        assert ours in text
        submission.write_text(text.replace(ours, draft, 1), encoding="utf-8")
        assert check_bundle(submission.parent, handed_in=True).broken() == {"draft"}, draft
    bare = without_marks(drafts)
    submission.write_text(bare, encoding="utf-8")
    findings = check_bundle(submission.parent, handed_in=True).findings
    assert sum(one.found == "why_unchanged" for one in findings) == len(OWN)


def test_figures_are_cited_as_they_stand_or_rounded(whole_bundle: Path) -> None:
    rows = json.loads((whole_bundle / "tables.json").read_text(encoding="utf-8"))["capacity_table"]
    text = "370 ms, of which 310.6; 0.37 s; 4.22 MiB in 12 blocks; 2 live, 160 tokens, 371 or 37.02 are none."
    assert figures_cited(text, rows) == {370.0, 310.6, 0.37, 4.22, 12.0}


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
    text = submission.read_text(encoding="utf-8")
    english = analysis(text, "en")
    submission.write_text(text.replace(analysis(text, "zh"), english), encoding="utf-8")
    assert count_characters(english)[1] == "words"
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
        ("nanovllm/../tests/lab/test_chain.py", "told", False),
    ],
)
def test_symbols_are_looked_up_and_nothing_is_imported(file: str, symbol: str, is_there: bool) -> None:
    assert has_symbol(file, symbol) == is_there
