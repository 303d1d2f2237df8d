"""A client for one answer at a time, on the standard library alone.

What it is: what `chat --url` and the questions before a benchmark use: the list of
models, and one streamed chat answer. What it knows nothing about: terminals, load.
Invariants: every wait has a limit; closing the iterator closes the connection, which
tells the server to stop; every failure is a RemoteError.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any

from nanovllm.errors import RemoteError
from nanovllm.lab.address import Address
from nanovllm.lab.streamed_answer import StreamedAnswer, error_of
from nanovllm.lab.streamed_response import StreamedResponse

CONNECT_S = 10.0
SILENCE_S = 300.0  # a long prompt on a slow machine is silent for minutes
MAX_BODY_BYTES = 2**20
CHUNK_BYTES = 2**16
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
START_HINT = "Start one with: nanovllm serve"


def list_models(address: Address, timeout_s: float = CONNECT_S) -> list[str]:
    """The names that /v1/models gives. Raises RemoteError."""
    with _response(address, "GET", "/v1/models", None, timeout_s) as response:
        body = _json_body(response)
    rows = body.get("data") if isinstance(body, dict) else None
    rows = rows if isinstance(rows, list) else []
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def first_model(address: Address) -> str:
    """The model to use where the user named none."""
    try:
        names = list_models(address)
    except RemoteError as error:
        if error.status != 404:
            raise
        names = []  # some servers have no such page
    if not names:
        message = f"The server at {address.url} lists no model."
        raise RemoteError(message, code="no_model", hint="Name one with --model NAME.")
    return names[0]


def stream_chat(address: Address, body: dict[str, Any], answer: StreamedAnswer) -> Generator[str]:
    """Ask, fill `answer`, and give its text piece by piece. Raises RemoteError."""
    yield from stream_turn(address, CHAT, body, answer)


def stream_turn(
    address: Address, path: str, body: dict[str, Any], answer: StreamedAnswer | StreamedResponse
) -> Generator[str]:
    """The same of any path that streams one answer. Raises RemoteError."""
    with _response(address, "POST", path, body, SILENCE_S) as response:
        _check_is_stream(response)
        while not answer.is_done and (chunk := response.read1(CHUNK_BYTES)):
            text = answer.feed(chunk, time.monotonic_ns())
            if text:
                yield text
    if not answer.is_complete:
        raise RemoteError("The server closed the connection in the middle of the answer.", code="cut")


def exchange(
    address: Address, method: str, path: str, body: dict[str, Any] | bytes | None = None, *, most_bytes: int
) -> bytes:
    """One request and its whole answer; `body` goes as JSON, bytes as they are. Raises RemoteError."""
    with _response(address, method, path, body, SILENCE_S) as response:
        data = response.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise RemoteError(f"The answer is larger than {most_bytes:,} bytes.", code="too_large")
    return data


@contextmanager
def _response(
    address: Address, method: str, path: str, body: dict[str, Any] | bytes | None, timeout_s: float
) -> Iterator[HTTPResponse]:
    """The response with status 200, its connection open for the time of the block."""
    kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
    connection = kind(address.host, address.port, timeout=CONNECT_S)
    response = None
    try:
        _connect(connection, address)
        connection.sock.settimeout(timeout_s)
        data = json.dumps(body) if isinstance(body, dict) else body
        binary = {"Content-Type": "application/octet-stream"} if isinstance(body, bytes) else {}
        connection.request(method, address.path + path, data, {**address.headers, **binary})
        response = connection.getresponse()
        if response.status != 200:
            raise _refusal(response, address)
        yield response
    except TimeoutError:
        raise RemoteError(f"{address.url} did not answer for {timeout_s:g} s.", code="timeout") from None
    except (OSError, HTTPException) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise RemoteError(f"The connection to {address.url} broke: {what[:200]}.", code="cut") from error
    finally:
        if response is not None:
            response.close()  # it keeps the socket open where the server announced that it will close
        connection.close()


def _connect(connection: HTTPConnection, address: Address) -> None:
    try:
        connection.connect()
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise RemoteError(f"No server answers at {address.url} ({why}).", code="refused", hint=START_HINT) from None


def _refusal(response: HTTPResponse, address: Address) -> RemoteError:
    """What the server said against the request, in its own words where it has any."""
    hint = "Give a key with --api-key or NANOVLLM_API_KEY." if response.status in (401, 403) else None
    try:
        return error_of(_json_body(response), response.status, hint)
    except RemoteError:
        message = f"{address.url} answered {response.status} {response.reason}."
        return RemoteError(message, code="refusal", status=response.status, hint=hint)


def _json_body(response: HTTPResponse) -> Any:
    data = response.read(MAX_BODY_BYTES + 1)
    try:
        if len(data) <= MAX_BODY_BYTES:
            return json.loads(data)
    except (ValueError, RecursionError):
        pass
    raise RemoteError("The server sent no JSON; it may be no OpenAI-compatible server.", code="not_json")


def _check_is_stream(response: HTTPResponse) -> None:
    if response.headers.get_content_type() != "text/event-stream":
        raise RemoteError("The server did not stream; it may be no OpenAI-compatible server.", code="not_sse")
