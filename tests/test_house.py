"""The house's rules, checked: import order, sizes, docstrings, what may never be written."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanovllm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, SHORT, SHORT_SHARE = 500, 60, 20, 0.6
OWN_LIMITS = {"engine/sequence.py": 150, "engine/block_manager.py": 200}
MAX_STEP = 30
# The one thing that belongs to the process: see its module.
PROCESS_STATE = {("kernels/selection.py", "_chosen_threads")}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter"}
FORBIDDEN = re.compile(r"\bpickle\b|\beval\(|\bexec\(|torch\.load|shell=True|os\.system")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def test_imports_run_one_way() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    longest = {path: max(map(lines_of, functions(tree_of(path))), default=0) for path in FILES}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    with capsys.disabled():
        print("\nlines  longest function  file (the ten longest)")
        for path in sorted(FILES, key=lambda path: -lengths[path])[:10]:
            print(f"{lengths[path]:5}  {longest[path]:16}  {name_of(path)}")
    limits = {path: OWN_LIMITS.get(name_of(path), MAX_FILE) for path in FILES}
    assert not [f"{name_of(path)}: {lengths[path]}" for path in FILES if lengths[path] > limits[path]]
    assert not [f"{name_of(path)}: {longest[path]}" for path in FILES if longest[path] > MAX_FUNCTION]


def test_most_functions_are_short() -> None:
    sizes = [lines_of(function) for path in FILES for function in functions(tree_of(path))]
    assert sum(size <= SHORT for size in sizes) / len(sizes) >= SHORT_SHARE


def test_a_step_is_one_screen() -> None:
    tree = tree_of(PACKAGE / "engine" / "llm_engine.py")
    engine = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LLMEngine")
    step = next(function for function in functions(engine) if function.name == "step")
    assert lines_of(step) <= MAX_STEP


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring, "no module docstring"
    assert path.name == "__init__.py" or len(docstring.splitlines()) >= 3


def test_nothing_that_runs_code_from_data() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found


def test_no_module_level_mutable_state() -> None:
    found = {(name_of(path), name) for path in FILES for name in mutable_names(tree_of(path))}
    assert found <= PROCESS_STATE, found - PROCESS_STATE


def mutable_names(tree: ast.Module) -> Iterator[str]:
    """Module-level names that functions rebind, and containers whose name does not say they are constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if is_mutable(node.value):
            yield from (name for name in names if name != "__all__" and not name.isupper())


def is_mutable(value: ast.expr) -> bool:
    called = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else None
    return isinstance(value, MUTABLE) or called in MUTABLE_CALLS


def test_constants_are_not_written_to() -> None:
    """No function puts anything into a module's constant container."""
    writers = {"append", "add", "update", "setdefault", "extend", "pop", "clear", "insert", "remove"}
    found = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            target = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            if isinstance(target, ast.Name) and target.id.isupper() and node.func.attr in writers:
                found.append(f"{name_of(path)}: {target.id}.{node.func.attr}")
            stores = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
            if stores and isinstance(node.value, ast.Name) and node.value.id.isupper():
                found.append(f"{name_of(path)}: {node.value.id}[...] =")
    assert not found


def test_public_names_are_sorted_and_complete() -> None:
    import nanovllm

    in_order = sorted(nanovllm.__all__, key=lambda name: (name.startswith("_"), not name.isupper(), name))
    assert nanovllm.__all__ == in_order
    assert set(nanovllm.__all__) == {*nanovllm._HOMES, "__version__"}
    for name in nanovllm.__all__:
        assert getattr(nanovllm, name) is not None
    for path in FILES:
        if "__all__" in path.read_text(encoding="utf-8") and path != PACKAGE / "__init__.py":
            module = importlib.import_module(".".join(("nanovllm", *path.relative_to(PACKAGE).with_suffix("").parts)))
            assert list(module.__all__) == sorted(module.__all__)


@pytest.mark.parametrize(
    "code",
    [
        "import nanovllm",
        "from nanovllm import SamplingParams, Segment",
        "import nanovllm.cli.main",
        "import nanovllm.observe.lifecycle, nanovllm.observe.timeline_view",
    ],
)
def test_torch_waits_for_its_first_use(code: str) -> None:
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=60)


def test_help_does_not_import_torch() -> None:
    """A torch that cannot be imported changes nothing for --help and for bad settings."""
    code = "import sys; sys.modules['torch'] = None; from nanovllm.cli.main import main; main()"
    for arguments, code_expected in ((["--help"], 0), (["run", "--help"], 0), (["run", "x", "hi", "--dtype", "?"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, timeout=60)
        assert done.returncode == code_expected, done.stderr.decode()


@pytest.mark.parametrize(
    ("listing", "code"),
    [
        ("", 1),
        ("tests/test_a.py::test_b", 1),  # no reason
        ("tests/test_a.py::test_c  # another test", 1),
        ("# a comment\ntests/test_a.py::test_b  # needs a GPU", 0),
        ("tests/test_a.py::test_b[1]  # needs a GPU", 0),
    ],
)
def test_a_skip_needs_a_listed_reason(tmp_path: Path, listing: str, code: int) -> None:
    report, allowed = tmp_path / "junit.xml", tmp_path / "allowed-skips.txt"
    case = '<testcase classname="tests.test_a" name="test_b[1]"><skipped message="no GPU"/></testcase>'
    report.write_text(f'<testsuites><testsuite>{case}<testcase classname="x" name="y"/></testsuite></testsuites>')
    allowed.write_text(listing)
    done = subprocess.run([sys.executable, ROOT / ".ci" / "check_skips.py", report, allowed], timeout=60)
    assert done.returncode == code
