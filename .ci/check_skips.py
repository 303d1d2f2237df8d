"""Fail where pytest skipped a test that is not listed with its reason.

    python .ci/check_skips.py junit.xml allowed-skips.txt

What it is: a reader of pytest's JUnit report. Expected failures (xfail) count as
skipped. An entry without a reason is an error; one that nothing matches is mentioned.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def skipped_tests(report: Path) -> dict[str, str]:
    """`path::name` -> message of each skipped test. The report is our own pytest's."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314
        skip = case.find("skipped")
        if skip is not None:
            found[f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"] = skip.get("message") or ""
    return found


def allowed_tests(listing: Path) -> dict[str, str]:
    """`path::name` -> reason of each line that is not a comment."""
    lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("#") for line in lines if line and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in pairs}


def main(report: Path, listing: Path) -> int:
    """Exit code: 0 where every skip is allowed."""
    skipped, allowed = skipped_tests(report), allowed_tests(listing)
    bad = [f"{name} has no reason in {listing}" for name, reason in allowed.items() if not reason]
    for name, message in skipped.items():
        if name not in allowed and name.partition("[")[0] not in allowed:
            bad.append(f"{name} was skipped and is not listed in {listing}: {message}")
    used = {name for name in allowed for test in skipped if name in (test, test.partition("[")[0])}
    for name in sorted(set(allowed) - used):
        print(f"note: {name} is listed, but was not skipped here")
    for problem in bad:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
