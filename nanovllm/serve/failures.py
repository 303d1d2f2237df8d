"""Failures as HTTP answers: one shape for all, `{"error": {message, type, param, code}}`.

What it is: the failures only HTTP has, and the way from any NanoVLLMError to status,
headers and bytes. What it knows nothing about: routes, the engine. Invariants: an
internal failure shows the client a request id and nothing else; a refusal that
happens a thousand times a second is rendered once.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from nanovllm.errors import (
    AuthenticationError,
    BusyError,
    DrainingError,
    NanoVLLMError,
    StateRefusedError,
    UnhealthyError,
)

Headers = list[tuple[bytes, bytes]]
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_SHOWN_FROM_500 = (501, 503, 504, 507)  # the others are internal: their text is for the log


class HttpError(NanoVLLMError):
    """A request that fails before the engine hears of it, for reasons of HTTP."""

    status, code = 400, "invalid_request"


class NotFoundError(HttpError):
    """No such path."""

    status, code = 404, "not_found"


class MethodNotAllowedError(HttpError):
    """The path exists, but not for this method. `allow` lists those it has."""

    status, code = 405, "method_not_allowed"

    def __init__(self, message: str, *, allow: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.allow = allow


class BodyTimeoutError(HttpError):
    """The body did not arrive in time; the connection is closed, for the rest of it may still come."""

    status, code = 408, "body_timeout"


class BadFramingError(HttpError):
    """Where the body ends cannot be told for certain; the connection is closed (RFC 9112, section 6.3)."""


class PayloadTooLargeError(HttpError):
    """The body is larger than the limit."""

    status, code = 413, "payload_too_large"


class UnsupportedMediaTypeError(HttpError):
    """The body is not JSON, or is compressed."""

    status, code = 415, "unsupported_media_type"


class LoadingError(DrainingError):
    """The model is not loaded yet."""

    code = "loading"


class RestartingError(DrainingError):
    """The engine's process has ended, and another one is starting."""

    code = UnhealthyError.code


def error_object(error: BaseException, request_id: str) -> dict[str, dict[str, str | None]]:
    """The failure as the client may see it. Anything unforeseen, and every internal failure, is only named."""
    known = error if isinstance(error, NanoVLLMError) else None
    if known is None or (known.status >= 500 and known.status not in _SHOWN_FROM_500):
        return _shape(f"The server failed. Request id: {request_id}.", "server_error", None, _code_of(known))
    return _shape(str(known), type_of(known.status), known.param, known.code)


def type_of(status: int) -> str:
    """OpenAI's coarse kind of an error."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def status_of(error: BaseException) -> int:
    """The HTTP status of any failure."""
    return error.status if isinstance(error, NanoVLLMError) else 500


def is_internal(error: BaseException) -> bool:
    """True where the failure is ours: it belongs into the log, with its traceback."""
    return status_of(error) >= 500 and status_of(error) not in _SHOWN_FROM_500


def body_of(error: BaseException, request_id: str) -> bytes:
    """The JSON body of the answer."""
    if isinstance(error, BusyError):  # the only failures that come in crowds
        return _busy_body(str(error), type_of(error.status), error.param, error.code)
    shown: dict[str, object] = {**error_object(error, request_id)}
    if isinstance(error, StateRefusedError) and error.receipt is not None:
        shown["receipt"] = error.receipt
    return msgspec.json.encode(shown)


def headers_of(error: BaseException) -> Headers:
    """The headers a failure brings besides content type and length."""
    headers: Headers = []
    if isinstance(error, BusyError):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if isinstance(error, AuthenticationError):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError) and error.allow:
        headers.append((b"allow", error.allow.encode("latin-1")))
    if isinstance(error, BodyTimeoutError | BadFramingError):
        headers.append((b"connection", b"close"))
    return headers


def _shape(message: str, kind: str, param: str | None, code: str) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _code_of(error: NanoVLLMError | None) -> str:
    return NanoVLLMError.code if error is None else error.code


@lru_cache(maxsize=64)
def _busy_body(message: str, kind: str, param: str | None, code: str) -> bytes:
    return msgspec.json.encode(_shape(message, kind, param, code))
