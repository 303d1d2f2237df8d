"""`nanovllm chat MODEL`: a conversation, each answer streamed to stdout.

What it is: the verb, its commands and the history it keeps. What it knows nothing
about: how the engine finds the history's KV again (by prefix, without being told).
Invariants: the history holds only what was said and shown; Ctrl-C ends the answer,
not the conversation; with piped stdin each line is a message and a failure ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanovllm.cli.flags import Setup, with_engine_flags, with_sampling_flags
from nanovllm.cli.run import MODEL_HELP, summary
from nanovllm.cli.session import interruptible, open_llm
from nanovllm.cli.terminal import note, write_answer
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import InvalidRequestError, NanoVLLMError
from nanovllm.observe.timeline_view import render

if TYPE_CHECKING:
    from nanovllm.engine.outputs import RequestOutput
    from nanovllm.llm import LLM

HELP = "/reset forgets the conversation, /timeline shows where the last answer's time went, /exit or Ctrl-D ends."


@with_engine_flags
@with_sampling_flags
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = "smollm2",
    *,
    system: Annotated[str | None, typer.Option("--system", help="Instructions put before the conversation.")] = None,
    sampling: SamplingParams,
    setup: Setup,
) -> None:
    """Talk with MODEL; each answer is streamed.

    In the conversation: /reset, /timeline, /help, /exit; Ctrl-C stops an answer.
    """
    with open_llm(model, setup) as llm:
        if llm.tokenizer.chat_template is None:
            raise InvalidRequestError(
                f"{model} has no chat template.", param="model", hint="Use nanovllm run --raw, or a chat model."
            )
        talk = Conversation(llm, sampling, system)
        note(HELP, quiet=setup.quiet or not sys.stdin.isatty())
        for line in _lines():
            if not talk.take(line):
                return


class Conversation:
    """The messages so far, and what one more line does to them."""

    def __init__(self, llm: LLM, sampling: SamplingParams, system: str | None) -> None:
        self._llm, self._sampling = llm, sampling
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = list(self._start)
        self.last: RequestOutput | None = None

    def take(self, line: str) -> bool:
        """Act on one line: a command or a message. False when it ends the conversation."""
        command = line.strip()
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.messages, self.last = list(self._start), None
            note("The conversation is forgotten.")
        elif command == "/timeline":
            note(f"{summary(self.last)}\n{render(self.last.timeline)}" if self.last else "There is no answer yet.")
        elif command.startswith("/"):
            note(HELP if command == "/help" else f"{command.split()[0]} is no command. {HELP}")
        elif command:
            self._say(line)
        return True

    def _say(self, text: str) -> None:
        """Answer one message. What could not be answered leaves the history as it was."""
        self.messages.append({"role": "user", "content": text})
        shown: list[str] = []
        try:
            self._stream(shown)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            note("\n(stopped)")
        except NanoVLLMError as error:
            if not sys.stdin.isatty():
                raise
            note(f"{error} /reset starts a new conversation.")
        if shown:
            self.messages.append({"role": "assistant", "content": "".join(shown)})
        else:
            self.messages.pop()

    def _stream(self, shown: list[str]) -> None:
        """Write the answer as it comes; each piece is in `shown` once it was written."""
        with interruptible(self._llm):
            for output in self._llm.stream(self.messages, self._sampling):
                write_answer(output.text)
                shown.append(output.text)
                self.last = output.final or self.last
        write_answer("\n")


def _lines() -> Iterator[str]:
    """The lines of stdin; on a terminal with a prompt and line editing. Ctrl-C at the prompt ends nothing."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    _enable_line_editing()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            note("\n(/exit or Ctrl-D ends the conversation)")


def _enable_line_editing() -> None:
    """Arrow keys and history in `input`, where the platform has readline."""
    try:
        import readline  # noqa: F401  its import is its effect
    except ImportError:
        return
