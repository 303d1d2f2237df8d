"""Real text for the benchmarks, from what every Python brings: its language reference and its modules' docstrings.

English prose with some code in it, the same for the same Python. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from pydoc_data import topics


def real_text() -> str:
    """About a million characters: the topics of `help()`, then the docstrings of the standard library."""
    reference = [topics.topics[name] for name in sorted(topics.topics)]
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n\n".join([*reference, *(doc for path in modules for doc in _docstrings(path))])


def _docstrings(path: Path) -> list[str]:
    """Of the module, its classes and their methods."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace")))
    return [doc for node in nodes if isinstance(node, documented) and (doc := ast.get_docstring(node))]
