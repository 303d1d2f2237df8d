"""Workloads: which requests come, when, how long, and which wait for which. Seeded plans, made before a run.

What it is: one generator whose knobs are separate, and eight named settings of them:
`short_ctx long_ctx mixed_ctx rag agent multi_turn multi_tenant bursty`. What it knows nothing
about: engines, clocks, text (`as_text` makes words where somebody needs them).

Invariants: the same knobs give the same plan, byte for byte, on every machine; each knob draws from streams of
its own, so that turning one leaves what the others decide as it was; a plan names a request before those that wait
for it; a session's turns have one namespace.

An open loop (`concurrency` None) starts sessions at `rate` a second, whatever becomes of them; a closed loop has
`concurrency` sessions under way, each beginning when an earlier one has ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from nanovllm.config import unknown_key
from nanovllm.errors import ConfigError
from nanovllm.lab.arrivals import arrival_times_ns
from nanovllm.lab.draws import Draws
from nanovllm.lab.prompts import WORDS


@dataclass(frozen=True)
class Knobs:
    """What can be turned, each by itself. Lengths are tokens."""

    seed: int = 0
    sessions: int = 16
    turns: int = 1
    concurrency: int | None = None
    rate: float = math.inf
    burstiness: float = 1.0
    length: int = 64
    spread: float = 0.25
    output_len: int = 32
    vocab: int = 256
    shared_len: int = 0  # a system prompt that all sessions of a tenant begin with
    tenants: int = 1
    long_len: int = 768  # of the prompts that are long in a mix
    long_share: float = 0.0
    documents: int = 0  # retrieved per turn, on average
    document_len: int = 128
    catalogue: int = 32  # documents there are
    follow_len: int | None = None  # what later turns add, such as a tool's answer; as `length` where None
    follow_spread: float = 0.25
    think_ms: int = 0  # from the end of a turn to the next one

    def __post_init__(self) -> None:
        for name in ("sessions", "turns", "length", "output_len", "vocab", "tenants", "long_len", "catalogue"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("shared_len", "documents", "think_ms"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("spread", "long_share", "follow_spread"):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._require("concurrency", self.concurrency is None or self.concurrency >= 1, "at least 1")
        self._require("rate", self.rate > 0, "more than 0")
        self._require("burstiness", self.burstiness > 0, "more than 0")

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: an infinite rate, everything at once, is None."""
        return {**vars(self), "rate": None if math.isinf(self.rate) else self.rate}

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {rule}, not {getattr(self, name)}.", param=name)


@dataclass(frozen=True)
class Part:
    """One named piece of a prompt."""

    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class PlannedRequest:
    """One request to come. It arrives at `arrival_ns`, or `delay_ns` after the request `after` has ended.

    With `continues`, its prompt is that one's whole conversation, output included, followed by `parts`.
    """

    request_id: str
    session: str
    turn: int
    parts: tuple[Part, ...]
    output_len: int
    namespace: str = ""
    arrival_ns: int | None = None
    after: str | None = None
    delay_ns: int = 0
    continues: bool = False

    @property
    def new_tokens(self) -> int:
        """Tokens of its own parts."""
        return sum(len(part.token_ids) for part in self.parts)


@dataclass(frozen=True)
class Workload:
    """A plan and the knobs it was made from."""

    name: str
    knobs: Knobs
    requests: tuple[PlannedRequest, ...]

    def prompt_lens(self) -> dict[str, int]:
        """Prompt length of each request in tokens, where every request generates its full output."""
        whole: dict[str, int] = {}
        prompts: dict[str, int] = {}
        for request in self.requests:
            history = whole[request.after] if request.continues and request.after else 0
            prompts[request.request_id] = history + request.new_tokens
            whole[request.request_id] = prompts[request.request_id] + request.output_len
        return prompts


SETTINGS = MappingProxyType(
    {
        "short_ctx": Knobs(length=64),
        "long_ctx": Knobs(length=768),
        "mixed_ctx": Knobs(length=64, long_len=768, long_share=0.25),
        "rag": Knobs(shared_len=32, documents=3),
        "agent": Knobs(
            turns=6, shared_len=128, length=48, follow_len=96, follow_spread=0.9, output_len=16, think_ms=50
        ),
        "multi_turn": Knobs(turns=4, shared_len=32, length=48, think_ms=500),
        "multi_tenant": Knobs(tenants=4, shared_len=64),
        "bursty": Knobs(sessions=64, rate=20.0, burstiness=0.1),
    }
)


def generate(name: str, knobs: Knobs | None = None, **turned: Any) -> Workload:
    """The workload `name` with its own knobs, or `knobs`, and those in `turned` changed. Raises ConfigError."""
    if name not in SETTINGS:
        raise unknown_key(name, list(SETTINGS), "Workload")
    known = [f.name for f in fields(Knobs)]
    for key in turned:
        if key not in known:
            raise unknown_key(key, known, "Knob")
    chosen = replace(knobs or SETTINGS[name], **turned)
    return Workload(name, chosen, tuple(_Generator(chosen).requests()))


short_ctx = partial(generate, "short_ctx")
long_ctx = partial(generate, "long_ctx")
mixed_ctx = partial(generate, "mixed_ctx")
rag = partial(generate, "rag")
agent = partial(generate, "agent")
multi_turn = partial(generate, "multi_turn")
multi_tenant = partial(generate, "multi_tenant")
bursty = partial(generate, "bursty")


def as_text(part: Part) -> str:
    """The part as words, about a token each."""
    return " ".join(WORDS[token_id % len(WORDS)] for token_id in part.token_ids)


class _Generator:
    """One plan. Each decision has a stream named after what is decided, the session and the turn."""

    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        self._arrivals = arrival_times_ns(knobs.sessions, knobs.rate, knobs.burstiness, knobs.seed)

    def requests(self) -> Iterator[PlannedRequest]:
        """Session by session, turn by turn."""
        for session in range(self._knobs.sessions):
            for turn in range(self._knobs.turns):
                yield self._request(session, turn)

    def _request(self, session: int, turn: int) -> PlannedRequest:
        knobs, tenant = self._knobs, self._draws("tenant", session).ranked(self._knobs.tenants)
        request = PlannedRequest(
            request_id=_name(session, turn),
            session=f"s{session}",
            turn=turn,
            parts=tuple(self._parts(session, turn, tenant)),
            output_len=self._draws("output", session, turn).near(knobs.output_len, knobs.spread),
            namespace=f"tenant-{tenant}" if knobs.tenants > 1 else "",
        )
        if turn:
            return replace(request, after=_name(session, turn - 1), delay_ns=knobs.think_ms * 10**6, continues=True)
        if knobs.concurrency is not None and session >= knobs.concurrency:
            return replace(request, after=_name(session - knobs.concurrency, knobs.turns - 1))
        return replace(request, arrival_ns=0 if knobs.concurrency is not None else self._arrivals[session])

    def _parts(self, session: int, turn: int, tenant: int) -> Iterator[Part]:
        knobs = self._knobs
        if knobs.shared_len and turn == 0:
            yield Part("system", self._draws("system", tenant).tokens(knobs.shared_len, knobs.vocab))
        yield from self._documents(session, turn)
        is_answer = turn > 0 and knobs.follow_len is not None
        content = self._draws("content", session, turn)
        yield Part("tool" if is_answer else "user", content.tokens(self._content_len(session, turn), knobs.vocab))

    def _documents(self, session: int, turn: int) -> Iterator[Part]:
        """Between none and twice as many as `documents`, popular ones more often, each with a length of its own."""
        knobs, choice = self._knobs, self._draws("documents", session, turn)
        for _ in range(choice.below(2 * knobs.documents + 1)):
            document = choice.ranked(knobs.catalogue)
            length = self._draws("document_len", document).near(knobs.document_len, 0.9)
            yield Part("document", self._draws("document", document).tokens(length, knobs.vocab))

    def _content_len(self, session: int, turn: int) -> int:
        knobs, length = self._knobs, self._draws("length", session, turn)
        if turn > 0 and knobs.follow_len is not None:
            return length.near(knobs.follow_len, knobs.follow_spread)
        is_long = self._draws("long", session).chance(knobs.long_share)
        return length.near(knobs.long_len if is_long else knobs.length, knobs.spread)

    def _draws(self, what: str, *where: int) -> Draws:
        return Draws(self._knobs.seed, what, *where)


def _name(session: int, turn: int) -> str:
    return f"s{session}-t{turn}"
