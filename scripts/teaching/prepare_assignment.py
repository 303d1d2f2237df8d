"""The pack of one experiment, as students get it: sheet, starter, public tests, submission template, manifest; beside
it `student_exercises/`, the engine's own file with its marked bodies taken out.

    python scripts/teaching/prepare_assignment.py --experiment 4               # course/experiments/, student_exercises/
    python scripts/teaching/prepare_assignment.py --experiment 4 --out /tmp/x  # somewhere else, to compare

What it is: the one way a pack comes about. Prose comes from `course/sources/experiment_4/*.md`, both languages from
one file; starters from the solutions in `tests/course/solutions/`, their bodies taken out; the template, columns,
cases and statements from the lab's own code. What it knows nothing about: what is taught.

Invariants: the same checkout gives the same pack, byte for byte; nothing in it is written by hand, so an older pack
is replaced whole, and `student_exercises/` too (students work on copies); every `file::symbol` in it exists. The
manifest has no commit: the pack is committed with its sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from experiment_4 import EXERCISE, FOLDER, STARTERS, SYMBOLS, listed, values
from paired import LANGUAGES, split
from skeleton import hollow, marked, signatures

from nanovllm.lab.experiment_4.template import render

ROOT = Path(__file__).resolve().parents[2]
GENERATOR_VERSION = 2
SOURCES, SOLUTIONS = ROOT / "course/sources", ROOT / "tests/course/solutions"
FOR_ALL = {"agents": "AGENTS.md", "changelog": "CHANGELOG.md", "teaching": "TEACHING.md"}


def main() -> int:
    """Write the pack and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=int, choices=[4], required=True)
    parser.add_argument("--term", default="spring-2026")
    parser.add_argument("--out", type=Path, help="instead of the repository's root")
    args = parser.parse_args()
    out = args.out or ROOT / "course/experiments"
    write(pack(args.term), out / FOLDER / f"assignment_{args.term}")
    write(exercises(args.term), (args.out or ROOT) / "student_exercises")
    return 0


def write(files: Mapping[str, str], folder: Path) -> None:
    """The folder anew, and a line that says so."""
    if folder.exists():
        shutil.rmtree(folder)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(files)} files in {folder}")


def pack(term: str) -> dict[str, str]:
    """Every file of the pack by its name."""
    for symbol in SYMBOLS:
        check_symbol(symbol)
    facts, files = facts_of(term), {}
    for lang, text in pages("experiment_4/sheet", facts).items():
        files[f"README.{lang}.md"] = text
        files[f"template/submission.{lang}.md"] = render(lang)
    for source, target in FOR_ALL.items():
        files[target] = both(f"experiment_4/{source}", facts)
    for name, solution in solutions().items():
        files[f"starter/{name}.py"] = hollow(solution, "实验4-任务4 / experiment 4, task 4")
    for test in sorted((SOURCES / "experiment_4/tests").glob("*.py")):
        files[f"tests/{test.name}"] = test.read_text(encoding="utf-8")
    files["manifest.json"] = manifest(files, term, facts["lab_version"])
    return dict(sorted(files.items()))


def exercises(term: str) -> dict[str, str]:
    """Every file of `student_exercises/`: the engine's files with their marked bodies out, and public tests."""
    test = SOURCES / "student_exercises/test_block_manager.py"
    return {
        EXERCISE: hollow((ROOT / EXERCISE).read_text(encoding="utf-8"), EXERCISE),
        "README.md": both("student_exercises/readme", facts_of(term)),
        f"tests/engine/{test.name}": test.read_text(encoding="utf-8"),
    }


def facts_of(term: str) -> dict[str, str]:
    """What the placeholders stand for."""
    todos = [todo for solution in solutions().values() for todo in marked(solution)]
    left_out = marked((ROOT / EXERCISE).read_text(encoding="utf-8"))
    return {**values(term), "todos": listed(todos), "exercise_todos": listed(left_out)}


def solutions() -> dict[str, str]:
    """Each starter's solution by its name."""
    return {name: (SOLUTIONS / f"{name}.py").read_text(encoding="utf-8") for name in STARTERS}


def both(source: str, facts: Mapping[str, str]) -> str:
    """One page with both languages."""
    return "\n".join(text.strip() + "\n" for text in pages(source, facts).values())


def pages(source: str, facts: Mapping[str, str]) -> dict[str, str]:
    """One source in each language."""
    paired = (SOURCES / f"{source}.md").read_text(encoding="utf-8")
    return {lang: split(paired, {**facts, "lang": lang})[lang].strip() + "\n" for lang in LANGUAGES}


def check_symbol(symbol: str) -> None:
    """Raises ValueError where `file::Class.method` is not in the checkout."""
    file, _, name = symbol.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    known = {line.split("(")[0] for line in signatures(source)}
    if f"class {name}" not in known and f"def {name}" not in known:
        raise ValueError(f"{file} has no {name}")


def manifest(files: Mapping[str, str], term: str, lab_version: str) -> str:
    """What the pack is made of."""
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(files.items())}
    document = {
        "experiment": 4,
        "term": term,
        "lab_version": int(lab_version),
        "generator": "scripts/teaching/prepare_assignment.py",
        "generator_version": GENERATOR_VERSION,
        "sha256": digests,
    }
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
