"""The terminal: what goes to a person, and how it is kept from doing harm.

What it is: writing answers to stdout and remarks to stderr. What it knows nothing
about: engines, models. Invariants: stdout carries the answer alone; on a terminal,
control characters that a model or a file made up are not passed on.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """`text` with control characters, which could steer a terminal, shown as U+FFFD; tab and newline stay."""
    return _CONTROL.sub("�", text.replace("\r\n", "\n"))


def write_answer(text: str, out: TextIO | None = None) -> None:
    """Write a piece of the answer at once; as it is to a file or pipe, harmless to a terminal."""
    out = out or sys.stdout
    out.write(harmless(text) if out.isatty() else text)
    out.flush()


def note(text: str, *, quiet: bool = False) -> None:
    """One remark on stderr, dim where that is a terminal."""
    if quiet:
        return
    sys.stdout.flush()
    text = harmless(text)
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def make_streams_lenient() -> None:
    """A closed stream is an empty one; a character the encoding lacks is shown as '?' and is no reason to stop."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # started with `>&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


class NoteHandler(logging.Handler):
    """Shows the package's log records as remarks: how the pool was sized, what was lowered."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging` for each record."""
        note(record.getMessage())


def show_log(quiet: bool) -> None:
    """Send the package's own log to stderr: information too, or with `quiet` errors alone."""
    logger = logging.getLogger("nanovllm")
    logger.handlers = [NoteHandler()]
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.propagate = False
