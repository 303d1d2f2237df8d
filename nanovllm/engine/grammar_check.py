"""grammar_check: one grammar built by llguidance, and a disposable process that tries a stranger's grammar first.

What it is: the calls into llguidance that build a matcher, and a script that makes them
under limits of time and memory. What it knows nothing about: requests, and the rest of
this package, which the script must not have to import. Invariant: what the script let
pass builds again in about the same time; what stalls, eats memory or crashes takes
the script down and nobody else. Intersections of patterns need that: their cost is exponential,
no setting of llguidance bounds it, and a thread inside it cannot be stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

CPU_S, MEMORY_BYTES = 2, 2 * 2**30  # of one compilation; llguidance itself takes 0.1 s of it to be imported
WALL_S = 10  # where the machine is so busy that no CPU time is spent
TOO_MUCH = f"The grammar takes more than {CPU_S} s or {MEMORY_BYTES // 2**30} GiB to compile."
LIMITS = {  # about half a second for the worst that the fuel does bound, and 20 ms for a mask
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ByteVocabulary:
    """What llguidance asks of a tokenizer, for one whose tokens are given as bytes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_token_ids, eos_token_id

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def build(tokenizer: Any, kind: str, text: str) -> Any:
    """An `LLMatcher` at its beginning. Raises ValueError with llguidance's words where the grammar is none."""
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, _source(LLMatcher, kind, text), limits=LLParserLimits(**LIMITS), log_level=0)
    if not matcher.is_error() and not matcher.is_stopped():
        matcher.compute_bitmask()  # a grammar that no text fits, such as {"$ref": "#"}, is found out here
    if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
        raise ValueError(matcher.get_error() or "no text fits it")
    return matcher


def check(kind: str, text: str) -> str | None:
    """Build a grammar in a process of its own; what is wrong with it, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps([kind, text]).encode(),
            capture_output=True,
            timeout=WALL_S,
        )
    except subprocess.TimeoutExpired:
        return TOO_MUCH
    if done.returncode > 0:
        raise RuntimeError(f"grammar_check cannot run: {done.stderr.decode(errors='replace')[-500:]}")
    return TOO_MUCH if done.returncode < 0 else json.loads(done.stdout)  # below 0: a signal ended it


def _source(matcher: Any, kind: str, text: str) -> str:
    if kind in ("json_object", "json_schema"):
        return matcher.grammar_from_json_schema(text or '{"type": "object"}', defaults=COMPACT)
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "choice":
        quoted = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        text = "start: " + " | ".join(quoted)
    return matcher.grammar_from_lark(text)


def _main() -> None:
    import resource
    from contextlib import suppress

    from llguidance import LLTokenizer

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = ByteVocabulary([bytes([i]) for i in range(256)] + [b"<end>"], [256], 256)
    error = None
    try:
        build(LLTokenizer(vocabulary), *json.load(sys.stdin))
    except ValueError as refused:
        error = str(refused)
    except BaseException as panic:  # noqa: BLE001  a panic is no Exception
        error = f"the compiler gave up ({type(panic).__name__})"
    json.dump(error, sys.stdout)


if __name__ == "__main__":
    _main()
