"""Where a conversation's answers come from, and those of an engine in this process.

What it is: the protocol that `chat` speaks, and its plainest speaker. What it knows nothing about: terminals, the
history. Invariant: ending an answer early gives its blocks back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nanovllm.cli.run import summary
from nanovllm.cli.session import interruptible
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.observe.timeline_view import render

if TYPE_CHECKING:
    from nanovllm.engine.outputs import RequestOutput
    from nanovllm.llm import LLM


class Answers(Protocol):
    """Where answers come from."""

    def history(self) -> list[dict[str, Any]]:
        """What was said before this process, as messages."""

    def opening(self) -> str | None:
        """A word on what is kept; None where nothing is."""

    def stream(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """The answer, piece by piece; closing it early stops the request. Raises NanoVLLMError."""

    def keep(self, said: Sequence[dict[str, Any]]) -> str | None:
        """A question and what was seen of its answer are part of the history now; a word on what was found."""

    def timeline(self) -> str | None:
        """Where the last answer's time went; None where there is none."""

    def forget(self) -> None:
        """The conversation begins anew."""


class LocalAnswers:
    """Answers of an engine in this process; nothing is kept."""

    def __init__(self, llm: LLM, sampling: SamplingParams, knowledge: Sequence[str]) -> None:
        self._llm, self._sampling, self._knowledge = llm, sampling, knowledge
        self._last: RequestOutput | None = None

    def history(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def opening(self) -> str | None:
        """Nothing to say."""
        return None

    def stream(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """Ctrl-C within it takes effect between two steps."""
        with interruptible(self._llm):
            for output in self._llm.stream(messages, self._sampling, knowledge=self._knowledge):
                yield output.text
                self._last = output.final or self._last

    def keep(self, said: Sequence[dict[str, Any]]) -> str | None:
        """The caller remembers."""
        return None

    def timeline(self) -> str | None:
        """The engine's own terms."""
        return None if self._last is None else f"{summary(self._last)}\n{render(self._last.timeline)}"

    def forget(self) -> None:
        """Nothing is kept of the last answer."""
        self._last = None
