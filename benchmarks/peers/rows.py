"""The rows of the comparison: which requests a row sends, and which figures it reads off the token times.

What it knows nothing about: engines, processes. Invariants: token ids are drawn from a seed made of the row and the
repeat, so every engine of a repeat gets the same and no repeat finds an earlier one's prefix; figures come from the
times at which tokens reached the caller and from nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Request = dict[str, Any]  # ids, max_tokens, after
Result = dict[str, Any]  # added_s, token_s, tokens
Figures = dict[str, float]
Send = Callable[[list[Request]], list[Result]]

IDS = (1000, 40000)  # ordinary tokens of the default model
# The decode gap: running streams, their prompts and outputs, how many tokens each has when the long prompt arrives
STREAMS, STREAM_PROMPT, STREAM_TOKENS, LEAD = 16, 128, 96, 16
WARM_TOKENS = 4
TAIL_SHARE = 128  # a warm prompt's new end: 16 of 2,048 tokens


@dataclass(frozen=True)
class Row:
    """`measure(draw, send)` sends requests and returns figures; `figure` is the one that ratios are made of."""

    name: str
    what: str
    figure: str
    unit: str
    measure: Callable[[Draw, Send], Figures]
    more_is_better: bool = False
    is_capped: bool = False


class Draw:
    """Prompts of random ordinary tokens; the same for every engine."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random(repr(seed))

    def request(self, length: int, max_tokens: int, after: int = 0) -> Request:
        """One new prompt."""
        return {"ids": [self._random.randrange(*IDS) for _ in range(length)], "max_tokens": max_tokens, "after": after}

    def requests(self, count: int, length: int, max_tokens: int) -> list[Request]:
        """`count` new prompts that arrive together."""
        return [self.request(length, max_tokens) for _ in range(count)]


def ttft(length: int) -> Callable[[Draw, Send], Figures]:
    """Cold: a prompt nobody has seen, after another of the same length."""

    def measure(draw: Draw, send: Send) -> Figures:
        send([draw.request(length, 1)])
        return {"ttft_s": _first_token_s(send([draw.request(length, 1)])[0])}

    return measure


def warm_ttft(length: int) -> Callable[[Draw, Send], Figures]:
    """A known prefix and a new end; once more before, so that what only the second time compiles is there."""

    def measure(draw: Draw, send: Send) -> Figures:
        tail = max(1, length // TAIL_SHARE)
        for _ in range(2):
            known, fresh = draw.request(length, 1), draw.request(tail, 1)
            cold = send([known])[0]
            warm = send([{**known, "ids": known["ids"][:-tail] + fresh["ids"]}])[0]
        return {"ttft_s": _first_token_s(warm), "cold_ttft_s": _first_token_s(cold)}

    return measure


def output_rate(count: int, length: int, max_tokens: int) -> Callable[[Draw, Send], Figures]:
    """All arrive together; output tokens over the time to the last one, prefill included."""

    def measure(draw: Draw, send: Send) -> Figures:
        send(draw.requests(count, length, WARM_TOKENS))
        results = send(draw.requests(count, length, max_tokens))
        seconds = max(r["token_s"][-1] for r in results) - min(r["added_s"] for r in results)
        figures = {"tok_s": count * max_tokens / seconds}
        if count == 1:
            first, last = results[0]["token_s"][0], results[0]["token_s"][-1]
            figures["decode_tok_s"] = (max_tokens - 1) / (last - first)
        return figures

    return measure


def decode_gap(length: int) -> Callable[[Draw, Send], Figures]:
    """The longest pause of running streams from a long prompt's arrival on; its TTFT beside its solo one."""

    def measure(draw: Draw, send: Send) -> Figures:
        send([draw.request(length, 1)])
        solo_s = _first_token_s(send([draw.request(length, 1)])[0])
        streams = draw.requests(STREAMS, STREAM_PROMPT, STREAM_TOKENS)
        *running, late = send([*streams, draw.request(length, 1, after=LEAD)])
        if min(r["token_s"][-1] for r in running) <= late["token_s"][0]:
            raise ValueError("the streams ended before the long prompt's first token: not comparable")
        figures = {"gap_s": max(_pauses(running, late["added_s"])), "ttft_s": _first_token_s(late)}
        before = sorted(p for r in running for p in _steps(r["token_s"], 0.0, late["added_s"]))
        return figures | {
            "solo_ttft_s": solo_s,
            "ttft_over_solo": figures["ttft_s"] / solo_s,
            "usual_gap_s": before[len(before) // 2],
        }

    return measure


def start_up(_draw: Draw, _send: Send) -> Figures:
    """Nothing is sent: the figure is the visit's own, from its process to the first token."""
    return {}


def make_rows(shrink: int = 1) -> tuple[Row, ...]:
    """All rows. `shrink` divides lengths and counts, for a run that only shows that everything works."""

    def size(tokens: int) -> int:
        return max(2, tokens // shrink)

    one = output_rate(1, size(128), size(128))
    many = {n: output_rate(size(n), size(256), size(128)) for n in (8, 32, 64)}
    rates: dict[str, Any] = {"figure": "tok_s", "unit": "tok/s", "more_is_better": True}
    return (
        *(Row(f"ttft_{n}", f"cold TTFT, {n} tokens", "ttft_s", "s", ttft(size(n))) for n in (128, 1024, 2048)),
        Row("warm_ttft_2048", "TTFT of 2048 tokens of which 2032 are known", "ttft_s", "s", warm_ttft(size(2048))),
        Row("one_stream", "one stream, 128 in 128 out", measure=one, **rates),
        *(
            Row(f"concurrent_{n}", f"{n} concurrent, 256 in 128 out", measure=many[n], **rates)
            for n in (8, 32, 64)
        ),
        Row(
            "decode_gap", "longest pause of 16 streams when 4096 tokens arrive", "gap_s", "s",
            decode_gap(size(4096)),
        ),
        Row("start_up", "start-up to first token, second start", "seconds", "s", start_up),
        Row("capped_one_stream", "one stream, float32, AVX2 at most", measure=one, is_capped=True, **rates),
        Row(
            "capped_concurrent_32", "32 concurrent, float32, AVX2 at most", measure=many[32], is_capped=True, **rates,
        ),
    )  # fmt: skip


def checked(requests: list[Request], results: list[Result]) -> list[Result]:
    """Refuses results that are not what was asked for: another number of tokens is another workload."""
    for request, result in zip(requests, results, strict=True):
        if len(result["tokens"]) != request["max_tokens"]:
            raise ValueError(f"{len(result['tokens'])} tokens came instead of {request['max_tokens']}: not comparable")
    return results


def _first_token_s(result: Result) -> float:
    return result["token_s"][0] - result["added_s"]


def _pauses(results: list[Result], since_s: float) -> Iterator[float]:
    for result in results:
        yield from _steps(result["token_s"], since_s, float("inf"))


def _steps(token_s: list[float], since_s: float, until_s: float) -> Iterator[float]:
    """Times between tokens that ended within the span."""
    return (b - a for a, b in pairwise(token_s) if since_s < b <= until_s)
