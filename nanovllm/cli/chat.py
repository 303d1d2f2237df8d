"""`nanovllm chat MODEL`, or `chat --url URL`: a conversation, each answer streamed to stdout.

What it is: the verb, its commands and the history it keeps. What it knows nothing
about: where answers come from (an engine here, or `remote.py`), and how the history's
KV is found again (by prefix, without being told).
Invariants: the history holds only what was said and shown; Ctrl-C ends the answer,
not the conversation; with piped stdin each line is a message and a failure ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from nanovllm.cli.flags import Setup, with_engine_flags, with_sampling_flags
from nanovllm.cli.remote import ApiKey, ServerModel, Url, open_server
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
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Default: smollm2.")] = None,
    *,
    system: Annotated[str | None, typer.Option("--system", help="Instructions put before the conversation.")] = None,
    knowledge: Annotated[
        list[str] | None,
        typer.Option("--knowledge", help="A document to answer from, NAME or NAME@VERSION; may be repeated."),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    server_model: ServerModel = None,
    sampling: SamplingParams,
    setup: Setup,
) -> None:
    """Talk with MODEL, or with a server (--url); each answer is streamed.

    In the conversation: /reset, /timeline, /help, /exit; Ctrl-C stops an answer.
    """
    if url is not None:
        if model is not None:
            raise InvalidRequestError(f"{model} would be opened here, not at --url.", hint=f"Write --model {model}.")
        _converse(open_server(url, api_key, server_model, sampling, setup, knowledge or ()), system, setup.quiet)
        return
    if server_model is not None:
        raise InvalidRequestError("--model names a server's model.", hint=f"Write nanovllm chat {server_model}.")
    with open_llm(model or "smollm2", setup, "chat") as llm:
        if llm.tokenizer.chat_template is None:
            raise InvalidRequestError(
                f"{model} has no chat template.", param="model", hint="Use nanovllm run --raw, or a chat model."
            )
        _converse(LocalAnswers(llm, sampling, knowledge or ()), system, setup.quiet)


def _converse(answers: Answers, system: str | None, quiet: bool) -> None:
    """Read lines until one ends the conversation."""
    talk = Conversation(answers, system)
    note(HELP, quiet=quiet or not sys.stdin.isatty())
    for line in _lines():
        if not talk.take(line):
            return


class Answers(Protocol):
    """Where answers come from."""

    def stream(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """The answer, piece by piece; closing it early stops the request. Raises NanoVLLMError."""

    def timeline(self) -> str | None:
        """Where the last answer's time went; None where there is none."""

    def forget(self) -> None:
        """The conversation begins anew."""


class LocalAnswers:
    """Answers of an engine in this process."""

    def __init__(self, llm: LLM, sampling: SamplingParams, knowledge: Sequence[str]) -> None:
        self._llm, self._sampling, self._knowledge = llm, sampling, knowledge
        self._last: RequestOutput | None = None

    def stream(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """Ctrl-C within it takes effect between two steps."""
        with interruptible(self._llm):
            for output in self._llm.stream(messages, self._sampling, knowledge=self._knowledge):
                yield output.text
                self._last = output.final or self._last

    def timeline(self) -> str | None:
        """The engine's own terms."""
        return None if self._last is None else f"{summary(self._last)}\n{render(self._last.timeline)}"

    def forget(self) -> None:
        """Nothing is kept of the last answer."""
        self._last = None


class Conversation:
    """The messages so far, and what one more line does to them."""

    def __init__(self, answers: Answers, system: str | None) -> None:
        self._answers = answers
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = list(self._start)

    def take(self, line: str) -> bool:
        """Act on one line: a command or a message. False when it ends the conversation."""
        command = line.strip()
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.messages = list(self._start)
            self._answers.forget()
            note("The conversation is forgotten.")
        elif command == "/timeline":
            note(self._answers.timeline() or "There is no answer yet.")
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
        """Write the answer as it comes. A piece is in `shown` before it is written: what was seen is remembered."""
        with closing(self._answers.stream(self.messages)) as pieces:
            for text in pieces:
                shown.append(text)
                write_answer(text)
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
