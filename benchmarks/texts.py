"""Real text for the benchmarks, from what every Python brings: its language reference and its modules' docstrings.

English prose with some code in it, the same for the same Python. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from pydoc_data import topics


def real_text(most: int = 10**9) -> str:
    """About a million characters, or the first `most`: the topics of `help()`, then the standard library's docstrings.

    No more modules are read than it takes: to parse all is a second and a half.
    """
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) >= most:
            break
        text = "\n\n".join([text, *_docstrings(path)])
    return text[:most]


def _docstrings(path: Path) -> list[str]:
    """Of the module, its classes and their methods."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace")))
    return [doc for node in nodes if isinstance(node, documented) and (doc := ast.get_docstring(node))]
