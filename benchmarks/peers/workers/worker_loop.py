"""What every engine's worker does alike: start, say so, then answer one line of JSON with another.

It runs in the peer's own environment, so it needs the standard library alone.

    argv[1]   {"model", "dtype", "threads", "max_model_len", "first_prompt"}: how to start
    out       {"ready": true, "about": {...}} once the first token of `first_prompt` is there
    in        {"requests": [{"ids": [...], "max_tokens": n, "after": k}, ...]}
    out       {"results": [{"added_s", "token_s": [...], "tokens": [...]}, ...]} or {"error": "..."}

A request with `after` k is added when each request before it has k tokens. Times are this process's monotonic seconds,
taken where the engine hands a token to its caller. What the engine prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass
class Asked:
    """One request and what has come back."""

    ids: list[int]
    max_tokens: int
    after: int = 0
    added_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Engine(Protocol):
    """What a worker implements."""

    def run(self, asked: list[Asked]) -> None:
        """Answer all of them; return when the last token has come."""

    def about(self) -> dict[str, Any]:
        """Versions and settings, to be printed."""


class Run:
    """Requests on their way: `add(index, request)` hands one to the engine, `took` notes its tokens."""

    def __init__(self, asked: list[Asked], add: Callable[[int, Asked], None]) -> None:
        self.asked, self._add = asked, add
        self._add_due()

    @property
    def is_done(self) -> bool:
        """Whether every request has all its tokens."""
        return all(len(one.tokens) >= one.max_tokens for one in self.asked)

    def took(self, index: int, tokens: Iterable[int]) -> None:
        """New tokens of one request came just now."""
        one, now_s = self.asked[index], time.perf_counter()
        for token in tokens:
            one.tokens.append(token)
            one.token_s.append(now_s)
        self._add_due()

    def _add_due(self) -> None:
        least = None
        for index, one in enumerate(self.asked):
            if one.added_s is None and (least is None or least >= one.after):
                one.added_s = time.perf_counter()
                self._add(index, one)
            least = min(len(one.tokens), least) if least is not None else len(one.tokens)


def serve(start: Callable[[dict[str, Any]], Engine]) -> None:
    """The whole life of a worker."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    engine = start(settings)
    engine.run([Asked(settings["first_prompt"], 1)])
    _send(out, {"ready": True, "about": engine.about()})
    for line in sys.stdin:
        asked = [Asked(**request) for request in json.loads(line)["requests"]]
        try:
            engine.run(asked)
        except Exception as error:  # noqa: BLE001  whatever a peer raises is its answer
            _send(out, {"error": f"{type(error).__name__}: {error}"[:500]})
        else:
            _send(out, {"results": [_result(one) for one in asked]})


def _result(one: Asked) -> dict[str, Any]:
    return {key: value for key, value in asdict(one).items() if key in ("added_s", "token_s", "tokens")}


def _send(out: Any, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()
