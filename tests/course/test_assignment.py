"""The pack of experiment 4: made again it is the committed one, and a student can walk through it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from skeleton import marked, signatures

from nanovllm.errors import InvalidRequestError
from nanovllm.lab.bundle import RAW
from nanovllm.lab.experiment_4 import check, plots, submission
from nanovllm.lab.experiment_4.cases import QUICK as QUICK_SIZE
from nanovllm.lab.experiment_4.cases import plan
from nanovllm.lab.experiment_4.engines import open_source
from nanovllm.lab.experiment_4.feed import feed
from nanovllm.lab.experiment_4.reference import compare
from nanovllm.lab.experiment_4.run import Settings, run_experiment
from nanovllm.lab.experiment_4.tables import RecordedRun, read_runs
from nanovllm.lab.student_observer import Observation
from tests.course.model_submission import fill

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "course/experiments/experiment_4_KV状态与缓存组织实验/assignment_spring-2026"
EXERCISES = ROOT / "student_exercises"
SOLUTIONS = ROOT / "tests/course/solutions"
OBSERVERS = {"state_counter": "StateCounter", "prefix_probe": "PrefixProbe"}
QUICK, SEED = ("--simulated", "--quick"), 7
FENCE = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Run = Callable[..., subprocess.CompletedProcess[str]]


def sheet(lang: str) -> str:
    return (PACK / f"README.{lang}.md").read_text(encoding="utf-8")


def commands(lang: str) -> list[list[str]]:
    """Every line of every fence of the sheet."""
    return [shlex.split(line) for fence in FENCE.findall(sheet(lang)) for line in fence.splitlines()]


def files_under(folder: Path) -> dict[str, bytes]:
    """Name -> bytes, without what Python leaves behind where somebody ran it."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not re.search("__pycache__|_cache/", name)}


def outcomes(folder: Path, *more: str, tests: str = "tests") -> tuple[set[str], str]:
    """The public tests that passed in a copy of `folder`, and everything that was printed."""
    command = [sys.executable, "-m", "pytest", tests, "-rA", "--tb=short", "-p", "no:cacheprovider", *more]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return set(re.findall(r"^PASSED \S+::(\w+)", done.stdout, re.MULTILINE)), done.stdout


# -- the pack --------------------------------------------------------------------------------------


def test_made_again_it_is_the_committed_one_byte_for_byte(tmp_path: Path) -> None:
    script = [sys.executable, "scripts/teaching/prepare_assignment.py", "--experiment", "4", "--out", str(tmp_path)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    made = files_under(tmp_path / PACK.relative_to(ROOT / "course/experiments"))
    assert made == files_under(PACK)
    digests = json.loads(made.pop("manifest.json"))["sha256"]
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
    assert files_under(tmp_path / "student_exercises") == files_under(EXERCISES)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_symbol_is_there(lang: str) -> None:
    """`file::symbol`, of the checkout or of the pack; every task but the writing of results names some."""
    tasks = re.split(r"^### ", sheet(lang), flags=re.MULTILINE)[1:]
    found = [re.findall(r"`([\w./]+\.py)::([\w.]+)`", task) for task in tasks]
    assert [bool(symbols) for symbols in found] == [True] * 4 + [False]
    for file, name in re.findall(r"`([\w./]+\.py)::([\w.]+)`", sheet(lang)):
        path = PACK / file if file.startswith("starter/") else ROOT / file
        known = [line.split("(")[0] for line in signatures(path.read_text(encoding="utf-8"))]
        assert f"class {name}" in known or f"def {name}" in known, f"{file}::{name}"


def test_both_languages_have_the_same_shape() -> None:
    """Twelve parts, five tasks, 85 minutes, the same tables, names and commands; only --lang differs."""
    shapes = []
    for lang in ("en", "zh"):
        text = sheet(lang)
        assert [int(n) for n in re.findall(r"^## (\d+)\.", text, re.MULTILINE)] == [*range(1, 13)]
        assert sum(int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)) == 85
        levels = re.findall(r"^#+", text, re.MULTILINE)
        spoken = [[word for word in command if word != lang] for command in commands(lang)]
        rows = [row.count("|") for row in re.findall(r"^\|.*", text, re.MULTILINE)]
        shapes.append((levels, spoken, rows, sorted(re.findall(r"`([\w./]+\.py::[\w.]+)`", text))))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_materials_are_there(lang: str) -> None:
    """R76: every path of the materials table but the tutorial, which is a text of its own."""
    rows = re.findall(r"^\| .*", re.split(r"^## \d+\. ", sheet(lang), flags=re.MULTILINE)[4], re.MULTILINE)
    paths = {path for row in rows for path in re.findall(r"`([\w./-]+\.(?:py|md)|course/[^`]+)", row)}
    wanted = {f"{place}nanovllm/engine/block_manager.py" for place in ("", "student_exercises/")}
    assert {*wanted, "nanovllm/engine/sequence.py", str(PACK.relative_to(ROOT))} <= paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_columns_and_cases_are_the_labs() -> None:
    text = sheet("zh")
    assert "| case | prompt_len | concurrency | live_requests | estimated_kv | TTFT | queue_wait | 解释 |" in text
    assert all(f"\n| {case} |" in text for case in ("short_ctx", "long_ctx", "mixed_ctx"))
    assert "10" in text and [*re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == ["10", "20", "25", "20", "10"]


@pytest.mark.parametrize(
    ("part", "items", "words"),
    [
        (1, 0, ["KV", "attention", "池"]),
        (2, 0, ["等待", "池已经满"]),
        (3, 4, ["KV 的一生", "并发", "长上下文", "探针"]),
        (4, 0, ["实验 3", "块表", "估计"]),
        (5, 4, ["生命周期图", "容量观察表", "500 到 800 字", "只是观测"]),
        (8, 4, ["attention 的中间量", "并发与等待", "宣称复用", "近似边界"]),
        (9, 5, ["生命周期图", "容量观察表", "因果链", "探针"]),
        (10, 3, ["单次计算", "因果链", "观测与真实效果"]),
        (11, 0, ["实验 5", "课程项目", "不成立的条件"]),
    ],
)
def test_the_sheet_says_what_it_must(part: int, items: int, words: list[str]) -> None:
    """Each part has its points in both languages, and the Chinese one its words."""
    for lang in ("zh", "en"):
        body = re.split(r"^## \d+\. ", sheet(lang), flags=re.MULTILINE)[part]
        assert len(re.findall(r"^(?:-|\d\.) ", body, re.MULTILINE)) == items
        assert lang == "en" or [word for word in words if word not in body] == []


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_starter_says_nothing_of_its_solution(name: str) -> None:
    """Same signatures; every marked body is its hints and an error that names the task."""
    solution = (SOLUTIONS / f"{name}.py").read_text(encoding="utf-8")
    starter = (PACK / f"starter/{name}.py").read_text(encoding="utf-8")
    assert signatures(starter) == signatures(solution)
    assert starter.count("raise NotImplementedError") == solution.count("BEGIN SOLUTION") == 2
    assert "SOLUTION" not in starter and "PROMPT" not in starter and "# TODO exp4_t4" in starter


# -- public tests, and the page for who teaches ---------------------------------------------------


def test_the_public_tests_fail_on_the_starters_and_pass_on_the_solutions(tmp_path: Path) -> None:
    """Run as a student runs them, in a copy of the pack; a failure names the task."""
    pack = tmp_path / "pack"
    shutil.copytree(PACK, pack)
    passed, printed = outcomes(pack)
    assert passed == set() and printed.count("NotImplementedError: 实验4-任务4 / experiment 4, task 4 (exp4_t4_") >= 2
    for name in OBSERVERS:
        shutil.copy(SOLUTIONS / f"{name}.py", pack / "starter")
    assert outcomes(pack)[0] == {f"test_{name}" for name in OBSERVERS}


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("state_counter", " + is_sampled", ""),
        ("state_counter", '"preempted", ', ""),
        ("prefix_probe", "len(prefix) < len(prompt)", "prefix"),
        ("prefix_probe", "prefix not in self.seen", "prefix[-4:] not in {one[-4:] for one in self.seen}"),
    ],
)
def test_the_public_tests_catch_the_mistakes_that_the_teaching_page_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, right: str, wrong: str
) -> None:
    public = runpy.run_path(str(PACK / "tests/test_observers.py"))[f"test_{name}"]
    monkeypatch.setitem(public.__globals__, "STARTER", tmp_path)
    solution = (SOLUTIONS / f"{name}.py").read_text(encoding="utf-8")
    assert solution.count(right) == 1
    for text in (solution, solution.replace(right, wrong)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        with contextlib.nullcontext() if text == solution else pytest.raises(AssertionError):
            public()


def test_the_exercise_is_the_engines_file_without_its_marked_bodies(tmp_path: Path) -> None:
    """Each public test but the given one fails by a body that is left out; on the engine's own file all pass."""
    reference = ROOT / "nanovllm/engine/block_manager.py"
    source = reference.read_text(encoding="utf-8")
    left = (EXERCISES / "nanovllm/engine/block_manager.py").read_text(encoding="utf-8")
    assert signatures(left) == signatures(source) and "SOLUTION" not in left
    assert re.findall(r"NotImplementedError\(\".* \((\w+)\)\"\)", left) == marked(source)
    desk = tmp_path / "student_exercises"
    shutil.copytree(EXERCISES, desk)
    passed, printed = outcomes(tmp_path, tests="student_exercises/tests")
    assert passed == {"test_given_a_fresh_pool_is_free"} and printed.count("\nE   NotImplementedError: ") == 5
    shutil.copy(reference, desk / "nanovllm/engine")
    passed, printed = outcomes(tmp_path, tests="student_exercises/tests")
    assert len(passed) == 6 and {f"test_{name}" for name in marked(source)} <= passed, printed


def test_the_teaching_page_names_every_body_and_every_rule() -> None:
    page = (PACK / "TEACHING.md").read_text(encoding="utf-8")
    todos = [todo for name in OBSERVERS for todo in marked((SOLUTIONS / f"{name}.py").read_text(encoding="utf-8"))]
    todos += marked((ROOT / "nanovllm/engine/block_manager.py").read_text(encoding="utf-8"))
    for name in (*todos, *check.RULES, *submission.RULES):
        assert page.count(f"`{name}`") >= 2, name
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == [10, 20, 25, 20, 10] * 2


# -- the student's way -----------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pack, and in it. Plots have tests of their own, and are half the time of a quick run."""
    copy = tmp_path / "my_experiment_4"
    shutil.copytree(PACK, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(plots, "draw", lambda *given: None)
    return copy


@pytest.mark.parametrize("lang", ["en", pytest.param("zh", marks=pytest.mark.long)])
def test_each_command_of_the_sheet_runs(nanovllm: Run, desk: Path, lang: str) -> None:
    """In the sheet's order, task 4 solved, the lab on the virtual clock; the last passes once the form is filled in."""
    shutil.copy(SOLUTIONS / "state_counter.py", desk / "starter")
    *walk, last = commands(lang)
    for command in walk:
        runs_lab = command[1:3] == ["lab", "run"]
        done = nanovllm(*command[1:], *([flag for flag in QUICK if flag not in command] if runs_lab else []))
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    done = nanovllm(*last[1:])
    assert done.returncode == 1 and "submission.md" in done.stdout
    form = desk / "runs/final/submission.md"
    form.write_text(fill(form.read_text(encoding="utf-8"), lang), encoding="utf-8")
    done = nanovllm(*last[1:])
    assert done.returncode == 0, done.stdout


def test_an_unsolved_starter_is_refused_by_task_and_line(nanovllm: Run, desk: Path) -> None:
    starter = "starter/state_counter.py:StateCounter"
    done = nanovllm("lab", "run", "4", "--out", "runs/try", *QUICK, "--observer", starter)
    assert done.returncode != 0
    assert "state_counter.py:StateCounter, line " in done.stderr
    assert "实验4-任务4 / experiment 4, task 4" in done.stderr


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RecordedRun]]:
    """A bundle on another seed than the sheet's: figures learnt by heart are wrong."""
    folder = tmp_path_factory.mktemp("bundles") / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *given: None)
        run_experiment(folder, Settings(model=None, quick=True, seed=SEED))
    return folder, read_runs(folder, plan(3))


def findings(observer: Path, name: str, recorded: tuple[Path, list[RecordedRun]]) -> list[str]:
    """What the check says of this observer, fed as `lab run` feeds it."""
    folder, runs = recorded
    observation = Observation(f"{observer}:{name}")
    with open_source(None, {}, QUICK_SIZE.roomy_blocks, 0) as source:
        vocab = source.vocab
    for run in runs:
        observation.observe(run.planned.name, feed(folder / RAW, run.planned, QUICK_SIZE, SEED, vocab))
    return [finding.text("en") for finding in compare({"reports": observation.reports}, runs)]


@pytest.mark.parametrize(("name", "solved"), OBSERVERS.items())
def test_a_model_solution_passes_on_every_run(recorded: tuple[Path, list[RecordedRun]], name: str, solved: str) -> None:
    assert findings(SOLUTIONS / f"{name}.py", solved, recorded) == []


@pytest.mark.parametrize(("name", "solved"), OBSERVERS.items())
def test_every_starter_is_refused(recorded: tuple[Path, list[RecordedRun]], name: str, solved: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{name}.py:{solved}, line \d+ failed .*实验4-任务4"):
        findings(PACK / f"starter/{name}.py", solved, recorded)


@pytest.mark.parametrize(("kind", "needed"), [("state_counter", "used_blocks_max"), ("prefix_probe", "overlap_tokens")])
def test_an_observer_that_counts_nothing_is_refused(
    recorded: tuple[Path, list[RecordedRun]], tmp_path: Path, kind: str, needed: str
) -> None:
    """The finding names the figure that is missing and what it should have been."""
    idle = tmp_path / "idle.py"
    idle.write_text(
        f"class Idle:\n    def on_event(self, event): pass\n    def report(self): return {{'kind': '{kind}'}}\n"
    )
    found = findings(idle, "Idle", recorded)
    assert sum(f"{needed} is (missing); the reference is" in text for text in found) == len(recorded[1])


def test_the_example_bundle_of_smollm2_passes_the_check() -> None:
    """Made on a real machine and committed beside the pack; every figure is computed again from its raw logs."""
    example = PACK.parent / "example_smollm2"
    verdict = check.check_bundle(example)
    assert verdict.is_pass, verdict.findings
    assert json.loads((example / "manifest.json").read_text(encoding="utf-8"))["dirty"] is False
