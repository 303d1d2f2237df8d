"""Which session a request says it belongs to: a hint for keeping and placing state, never part of a prompt.

What it is: `session_id`, the header `X-Session-ID` and `prompt_cache_key` as one string. What it knows nothing
about: what the engine makes of it. Invariants: it adds no message and selects no KV; two that disagree are
refused; whose session it is follows from the key, not from the string.
"""

from __future__ import annotations

import re

from starlette.requests import Request

from nanovllm.errors import InvalidRequestError
from nanovllm.serve.protocol import MAX_SESSION, Hinted

HEADER = "x-session-id"
_PRINTABLE = re.compile(rf"[!-~]{{1,{MAX_SESSION}}}")


def session_of(request: Request, body: Hinted) -> str:
    """The session's name, "" for none. `prompt_cache_key` stands in where there is no `session_id`.

    Raises InvalidRequestError where header and field differ, or the header is not 1 to 128 printable characters.
    """
    given = request.headers.getlist(HEADER)
    if len(given) > 1 or (given and not _PRINTABLE.fullmatch(given[0])):
        raise InvalidRequestError(
            f"X-Session-ID must be once 1 to {MAX_SESSION} printable ASCII characters without blanks.",
            param="X-Session-ID",
        )
    if given and body.session_id is not None and body.session_id != given[0]:
        raise InvalidRequestError(
            "session_id and the header X-Session-ID differ.", param="session_id", hint="Send one of them."
        )
    return given[0] if given else body.session_id or body.prompt_cache_key or ""
