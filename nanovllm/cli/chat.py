"""`nanovllm chat MODEL`, or `chat --url URL`: a conversation, each answer streamed to stdout.

What it is: the verb, its commands and the history it keeps. What it knows nothing
about: where answers come from (an engine here, or a server), whether they outlive the
process, and how the history's KV is found again (by prefix, without being told).
Invariants: the history holds only what was said and shown; Ctrl-C ends the answer,
not the conversation; with piped stdin each line is a message and a failure ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any

import typer

from nanovllm.cli.chat_answers import Answers, LocalAnswers
from nanovllm.cli.flags import Setup, with_engine_flags, with_sampling_flags
from nanovllm.cli.kept_chat import KeptAnswers, check_session, kept_setup
from nanovllm.cli.remote import ApiKey, RemoteAnswers, ServerModel, Url, open_server
from nanovllm.cli.remote_session import RemoteSession
from nanovllm.cli.run import MODEL_HELP
from nanovllm.cli.session import open_llm
from nanovllm.cli.terminal import note, write_answer
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import InvalidRequestError, NanoVLLMError

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
    session: Annotated[
        str | None, typer.Option("--session", help="Keep the conversation under this name, and go on with it.")
    ] = None,
    sampling: SamplingParams,
    setup: Setup,
) -> None:
    """Talk with MODEL, or with a server (--url); each answer is streamed.

    --session NAME goes on where the session of that name stopped: on the server, or in --state-dir (default: in the \
cache).

    In the conversation: /reset, /timeline, /help, /exit; Ctrl-C stops an answer.
    """
    name = None if session is None else check_session(session)
    if url is not None:
        if model is not None:
            raise InvalidRequestError(f"{model} would be opened here, not at --url.", hint=f"Write --model {model}.")
        address, request = open_server(url, api_key, server_model, sampling, setup, knowledge or ())
        remote = RemoteAnswers(address, request) if name is None else RemoteSession(address, request, name, system)
        _converse(remote, system, setup.quiet)
        return
    if server_model is not None:
        raise InvalidRequestError("--model names a server's model.", hint=f"Write nanovllm chat {server_model}.")
    setup = setup if name is None else kept_setup(model or "smollm2", setup)
    with open_llm(model or "smollm2", setup, "chat") as llm:
        if llm.tokenizer.chat_template is None:
            raise InvalidRequestError(
                f"{model} has no chat template.", param="model", hint="Use nanovllm run --raw, or a chat model."
            )
        known = knowledge or ()
        local = LocalAnswers(llm, sampling, known) if name is None else KeptAnswers(llm, sampling, known, name)
        _converse(local, system, setup.quiet)


def _converse(answers: Answers, system: str | None, quiet: bool) -> None:
    """Read lines until one ends the conversation."""
    talk = Conversation(answers, system, quiet=quiet)
    opening = None if quiet else answers.opening()
    note(opening or "", quiet=opening is None)
    note(HELP, quiet=quiet or not sys.stdin.isatty())
    for line in _lines():
        if not talk.take(line):
            return


class Conversation:
    """The messages so far, and what one more line does to them."""

    def __init__(self, answers: Answers, system: str | None, *, quiet: bool = False) -> None:
        self._answers, self._quiet = answers, quiet
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = [*self._start, *answers.history()]

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
            self._keep()
        else:
            self.messages.pop()

    def _keep(self) -> None:
        try:
            found = self._answers.keep(self.messages[-2:])
        except NanoVLLMError as error:
            if not sys.stdin.isatty():
                raise
            note(f"This turn is not kept: {error}")
        else:
            note(found or "", quiet=self._quiet or found is None)

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
