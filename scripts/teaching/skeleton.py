"""Skeletons: a solution with its marked bodies taken out.

What it is: the file as a student gets it. What it knows nothing about: what is taken out.

    # BEGIN SOLUTION exp4_t4_live        the body, up to
    # END SOLUTION                       this line, at the same depth
    # PROMPT 说明 / hint                  inside it: these lines stay, as comments

Invariants: a body becomes its prompts and one `raise NotImplementedError` that names the task, never `pass`;
marks are neither nested nor unclosed, ids are unique; what is left has the same classes, functions and signatures.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_BEGIN = re.compile(r"^( *)# BEGIN SOLUTION (\w+)$")
_END = re.compile(r"^( *)# END SOLUTION$")
_PROMPT = re.compile(r"^( *)# PROMPT (.*)$")


def hollow(source: str, task: str) -> str:
    """The skeleton of `source`; `task` is what an unsolved body raises. Raises ValueError for bad marks."""
    lines: list[str] = []
    ids: list[str] = []
    open_at: str | None = None
    for line in source.splitlines():
        if begin := _BEGIN.match(line):
            if open_at is not None or begin[2] in ids:
                raise ValueError(f"a solution is nested or named twice: {line.strip()}")
            open_at, ids = begin[1], [*ids, begin[2]]
            lines.append(f"{open_at}# TODO {begin[2]}")
        elif end := _END.match(line):
            if end[1] != open_at:
                raise ValueError("a solution ends that did not begin here")
            lines.append(f'{open_at}raise NotImplementedError("{task} ({ids[-1]})")')
            open_at = None
        elif open_at is None:
            lines.append(line)
        elif prompt := _PROMPT.match(line):
            lines.append(f"{open_at}# {prompt[2]}")
    if open_at is not None or not ids:
        raise ValueError("a solution is not closed" if ids else "nothing is marked as a solution")
    text = "\n".join(lines) + "\n"
    if signatures(text) != signatures(source):
        raise ValueError("the skeleton's signatures are not the solution's")
    return text


def marked(source: str) -> list[str]:
    """The ids of the bodies that a skeleton leaves out, in order."""
    return [begin[2] for line in source.splitlines() if (begin := _BEGIN.match(line))]


def signatures(source: str) -> list[str]:
    """Every public class, function and method of a module with its arguments, in order: `def Class.method(self)`."""
    return list(_named(ast.parse(source), ""))


def _named(parent: ast.AST, prefix: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield f"class {prefix}{node.name}"
            yield from _named(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield f"def {prefix}{node.name}({ast.unparse(node.args)})"
