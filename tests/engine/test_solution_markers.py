"""The bodies that teaching skeletons leave out: marked, complete, and not needed to import the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nanovllm

PACKAGE = Path(nanovllm.__file__).parent
IDS = {
    "can_allocate",
    "allocate",
    "deallocate",
    "hash_blocks",
    "schedule",
    "postprocess",
    "preempt",
    "add_request",
    "step",
}
MARKED = re.compile(r"^( *)# BEGIN SOLUTION (\w+)\n(.*?)^ *# END SOLUTION\n", re.MULTILINE | re.DOTALL)


def marked() -> dict[str, tuple[Path, str]]:
    """Marker id -> (file, the text from BEGIN to END)."""
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for match in MARKED.finditer(path.read_text(encoding="utf-8")):
            assert match[2] not in found, f"{match[2]} is marked twice"
            found[match[2]] = (path, match[0])
    return found


def hollow(text: str) -> str:
    """The file with every marked body replaced, as a skeleton generator does it."""
    return MARKED.sub(lambda m: f"{m[1]}raise NotImplementedError\n", text)


def test_each_body_is_marked_once_inside_the_function_of_its_name() -> None:
    found = marked()
    assert set(found) == IDS
    for name, (path, body) in found.items():
        before = path.read_text(encoding="utf-8").split(body)[0]
        assert re.findall(r"def (\w+)\(", before)[-1] == name


def test_the_package_imports_with_every_body_left_out(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "nanovllm", ignore=shutil.ignore_patterns("__pycache__"))
    for path, _ in marked().values():
        copy = tmp_path / "nanovllm" / path.relative_to(PACKAGE)
        copy.write_text(hollow(copy.read_text(encoding="utf-8")), encoding="utf-8")
    script = (
        "import nanovllm.llm, nanovllm.engine.build, nanovllm.engine.block_manager as b\n"
        f"assert nanovllm.__file__.startswith({str(tmp_path)!r}), nanovllm.__file__\n"
        "from nanovllm.core.sampling_params import SamplingParams\n"
        "from nanovllm.engine.sequence import Sequence\n"
        "try:\n    b.BlockManager(4, 4).can_allocate(Sequence([1], SamplingParams(), 4))\n"
        "except NotImplementedError:\n    print('hollow')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "hollow", done.stderr
