"""How fast prompts are prefilled: what admission bounds the queue by.

What it is: one decayed mean. What it knows nothing about: clocks, requests, what is made of it.
Invariants: a step counts by its prefill tokens, so that a prompt of a few tokens beside many
decodes says next to nothing; nothing is said before a few blocks' worth was seen.
"""

from __future__ import annotations

from math import exp

MEMORY_TOKENS = 2048.0  # what was prefilled so many tokens ago counts 1/e
ENOUGH_TOKENS = 64.0


class PrefillRate:
    """Tokens over seconds, of the last few thousand tokens."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def note(self, prefill_tokens: int, decode_tokens: int, seconds: float) -> None:
        """A step: what it computed, and how long it took. Decodes beside it take their share of the time."""
        if prefill_tokens <= 0:
            return
        kept = exp(-prefill_tokens / MEMORY_TOKENS)
        self._tokens = kept * self._tokens + prefill_tokens
        self._seconds = kept * self._seconds + seconds * prefill_tokens / (prefill_tokens + decode_tokens)

    @property
    def tokens_per_s(self) -> float:
        """0 where too little was seen to say."""
        is_known = self._tokens >= ENOUGH_TOKENS and self._seconds > 0
        return self._tokens / self._seconds if is_known else 0.0
