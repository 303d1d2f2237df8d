"""Bodies: read whole, within a size and a time, or not at all.

What it is: `read_body`, and the check of a request's head that comes before it. What it
knows nothing about: what a body says. Invariants: never more than the limit is held,
whatever the head promised; a compressed body is refused, so no bomb is unpacked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request

from nanovllm.errors import InvalidRequestError
from nanovllm.serve.context import Services
from nanovllm.serve.failures import BadFramingError, BodyTimeoutError, PayloadTooLargeError, UnsupportedMediaTypeError

JSON = "application/json"
BYTES_PER_TOKEN = 3  # fewer than text has, so that an estimate is rarely too low


async def read_body(request: Request, services: Services) -> bytes:
    """The whole body. Raises PayloadTooLargeError, BodyTimeoutError, InvalidRequestError, ClientDisconnect."""
    most, timeout_s = services.limits.body_bytes, services.config.body_timeout
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {timeout_s:g} s.") from None
    if not size:
        raise InvalidRequestError("The body is empty.", hint="Send a JSON object.")
    return b"".join(parts)


def check_head(headers: Mapping[bytes, bytes], max_body_bytes: int, wanted: str = JSON) -> None:
    """Refuse by its head a body that would not be read, or is not of the `wanted` media type. Raises HttpError."""
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type != wanted.encode():
        what = "JSON" if wanted == JSON else wanted
        raise UnsupportedMediaTypeError(f"The body must be {what}.", hint=f"Send Content-Type: {wanted}.")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise UnsupportedMediaTypeError("A compressed body is not read.", hint="Leave Content-Encoding out.")
    if b"content-length" in headers and b"transfer-encoding" in headers:  # two readers could disagree on its end
        raise BadFramingError("Content-Length and Transfer-Encoding exclude each other.")
    if int(headers.get(b"content-length", b"0")) > max_body_bytes:
        raise _too_large(max_body_bytes)


def estimated_tokens(headers: Mapping[bytes, bytes], most: int) -> int:
    """How many prompt tokens a body may hold, by its length; without one, as many as the model takes."""
    length = headers.get(b"content-length")
    return most if length is None else min(int(length) // BYTES_PER_TOKEN, most)


def _too_large(most: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body is larger than {most} bytes.")
