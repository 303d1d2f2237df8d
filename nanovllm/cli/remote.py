"""A server as the other side of a conversation: `nanovllm chat --url`.

What it is: the flags that name a server, and answers that come from one. What it knows
nothing about: history, commands, engines. Invariants: ending the iteration early closes
the connection, so that the server gives the request's blocks back; times are this
client's own; the key is shown nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from nanovllm.cli.flags import Setup, flag_of
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import InvalidRequestError
from nanovllm.lab.address import Address
from nanovllm.lab.client import first_model, stream_chat
from nanovllm.lab.streamed_answer import StreamedAnswer
from nanovllm.lab.streamed_response import StreamedResponse

SERVER_PANEL = "Server"
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="NANOVLLM_API_KEY", help="The server's key, if it wants one.", rich_help_panel=SERVER_PANEL
    ),
]
Url = Annotated[
    str | None,
    typer.Option("--url", help="Talk with the server there, e.g. http://127.0.0.1:8000.", rich_help_panel=SERVER_PANEL),
]
ServerModel = Annotated[
    str | None,
    typer.Option("--model", help="The server's model (default: the first it lists).", rich_help_panel=SERVER_PANEL),
]


def open_server(
    url: str,
    api_key: str | None,
    model: str | None,
    sampling: SamplingParams,
    setup: Setup,
    knowledge: Sequence[str] = (),
) -> tuple[Address, dict[str, Any]]:
    """The server, seen to be there, and what each request carries. Engine flags are refused: its engine is set up."""
    others = {"config": setup.config_file, "log": setup.log, "events": setup.events}
    given = [*setup.settings, *(name for name, value in others.items() if value is not None)]
    if given:
        raise InvalidRequestError(
            f"{flag_of(given[0])} has no effect on a server.", param=given[0], hint="Leave it out, or --url."
        )
    address = Address.parse(url, api_key)
    fields = request_fields(model or first_model(address), sampling)
    return address, {**fields, "knowledge": [*knowledge]} if knowledge else fields


def request_fields(model: str, sampling: SamplingParams) -> dict[str, Any]:
    """What each request carries besides its messages. Servers refuse fields they do not know: defaults stay unsaid."""
    plain = SamplingParams()
    said = {f.name: getattr(sampling, f.name) for f in fields(SamplingParams)}
    changed = {name: value for name, value in said.items() if value != getattr(plain, name)}
    always = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    return {"model": model, **always, **changed, "stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Heard:
    """The last answer, and when it was asked for."""

    sent_ns: int
    answer: StreamedAnswer | StreamedResponse


class RemoteAnswers:
    """Answers of one model on one server."""

    def __init__(self, address: Address, request: dict[str, Any]) -> None:
        self._address, self._request = address, request
        self._last: Heard | None = None

    def history(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def opening(self) -> str | None:
        """Nothing to say."""
        return None

    def keep(self, said: Sequence[dict[str, Any]]) -> str | None:
        """The caller remembers."""
        return None

    def stream(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """The answer, piece by piece. Raises RemoteError."""
        answer = StreamedAnswer()
        heard = Heard(time.monotonic_ns(), answer)
        pieces = stream_chat(self._address, {**self._request, "messages": messages}, answer)
        with closing(pieces):
            for piece in pieces:
                self._last = heard
                yield piece

    def forget(self) -> None:
        """The conversation begins anew."""
        self._last = None

    def timeline(self) -> str | None:
        """The last answer in two lines; None before the first."""
        return None if self._last is None else described(self._last)


def described(heard: Heard) -> str:
    """An answer in two lines, by this client's clock."""
    answer, usage = heard.answer, heard.answer.usage
    first_ns, last_ns = answer.text_ns[0], answer.text_ns[-1]
    count = usage.completion_tokens
    what = f"{len(answer.text_ns)} chunks of text" if count is None else f"{count} tokens"
    rate = ((count or len(answer.text_ns)) - 1) / (last_ns - first_ns) * 1e9 if last_ns > first_ns else None
    speed = "" if rate is None else f", {rate:,.1f} {'chunks' if count is None else 'tokens'}/s after the first"
    prompt = "" if usage.prompt_tokens is None else f"{usage.prompt_tokens} prompt tokens; "
    cached = "" if usage.cached_tokens is None else f"{usage.cached_tokens} cached; "
    return (
        f"{prompt}{cached}{what}; finish_reason {answer.finish_reason or 'none: it was stopped'}\n"
        f"TTFT {(first_ns - heard.sent_ns) / 1e6:,.2f} ms{speed} (measured by this client, the network in it)"
    )
