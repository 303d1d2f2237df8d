"""What a person types at a benchmark: counts that are counts, and one line where something is off."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from nanovllm.errors import NanoVLLMError


def at_least_one(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def told(main: Callable[[], int | None]) -> None:
    """Run `main` and exit as it says; an error of the package's is told in a line, with the mend."""
    try:
        sys.exit(main())
    except NanoVLLMError as error:
        sys.exit(f"{error.message} {error.hint or ''}".strip())
