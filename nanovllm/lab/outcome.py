"""What became of one request of a benchmark, read from its bytes after the run.

What it is: the judge of one `Exchange`: completed, rejected or failed, with the times
that metrics are made of. What it knows nothing about: other requests, percentiles.
Invariants: the three verdicts are complete and exclude each other; a rejection is a
429 or a 503 before any answer, everything else that is not a whole answer is a failure.

Definitions, t being arrival times at the client (the same as `vllm bench serve` uses):
    TTFT = t(first chunk that carries text) - t(sent)       the role chunk carries none
    E2E  = t(last chunk with a choice) - t(sent)            the last text or the finish reason
    TPOT = (E2E - TTFT) / (N_out - 1)                       for N_out >= 2; the time of each token but the first
    ITL  = the gaps between successive chunks that carry text
N_out is the server's usage.completion_tokens, or where it sends no usage the number of chunks that carry text.
A server may put several tokens into one chunk (speculation, half characters): ITL is then a gap between
chunks, TPOT is still a time per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from nanovllm.errors import RemoteError
from nanovllm.lab.load import Exchange
from nanovllm.lab.streamed_answer import StreamedAnswer, Usage

REJECTIONS = (429, 503)
Verdict = Literal["completed", "rejected", "failed"]


@dataclass(frozen=True)
class Outcome:
    """One request. Latencies are None where they are not defined: no text, or one token."""

    verdict: Verdict
    reason: str = ""  # a rejection's status, a failure's name, a completed answer's finish reason
    sent_ns: int = 0
    ended_ns: int = 0
    late_ns: int | None = None  # open loop: sent this much after its time
    text_ns: list[int] = field(default_factory=list)
    last_choice_ns: int | None = None
    usage: Usage = field(default_factory=Usage)

    @property
    def output_tokens(self) -> int:
        """N_out."""
        counted = self.usage.completion_tokens
        return len(self.text_ns) if counted is None else counted

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token."""
        return self.text_ns[0] - self.sent_ns if self.text_ns else None

    @property
    def e2e_ns(self) -> int | None:
        """End to end."""
        return None if self.last_choice_ns is None else self.last_choice_ns - self.sent_ns

    @property
    def tpot_ns(self) -> float | None:
        """Time per output token after the first."""
        if self.ttft_ns is None or self.e2e_ns is None or self.output_tokens < 2:
            return None
        return (self.e2e_ns - self.ttft_ns) / (self.output_tokens - 1)

    @property
    def gaps_ns(self) -> list[int]:
        """Inter-token latencies."""
        return [later - earlier for earlier, later in pairwise(self.text_ns)]


def judge(exchange: Exchange) -> Outcome:
    """The outcome of one exchange; never raises."""
    answer = StreamedAnswer()
    verdict, reason = _verdict(exchange, answer)
    return Outcome(
        verdict,
        reason,
        exchange.sent_ns,
        exchange.ended_ns,
        None if exchange.due_ns is None else exchange.sent_ns - exchange.due_ns,
        answer.text_ns,
        answer.last_choice_ns,
        answer.usage,
    )


def _verdict(exchange: Exchange, answer: StreamedAnswer) -> tuple[Verdict, str]:
    """The verdict and its reason; `answer` is filled as far as it goes."""
    if exchange.status in REJECTIONS:
        return "rejected", str(exchange.status)
    if exchange.status is not None and exchange.status != 200:
        return "failed", f"http_{exchange.status}"
    if exchange.status == 200 and exchange.content_type != "text/event-stream":
        return "failed", exchange.failure or "not_sse"
    try:
        for at_ns, chunk in exchange.chunks:
            answer.feed(chunk, at_ns)
    except RemoteError as error:
        return "failed", error.code
    if answer.is_done or (answer.is_complete and exchange.failure is None):
        return "completed", answer.finish_reason or "none given"
    return "failed", exchange.failure or "cut"
