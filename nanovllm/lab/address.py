"""Where a server is, and the key it wants: checked before anything is sent.

What it is: an URL and a key as the user wrote them, turned into parts that HTTP
clients take. What it knows nothing about: connections. Invariants: an address is
valid once made; the key is in no text that is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from nanovllm.errors import InvalidRequestError, shown

HINT = "Write it like http://127.0.0.1:8000."


@dataclass(frozen=True)
class Address:
    """One server. `path` is what stands before /v1, for servers behind a proxy."""

    scheme: str
    host: str
    port: int
    path: str = ""
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Address:
        """Raises InvalidRequestError naming the parameter. An URL that ends in /v1 means the same server."""
        parts, port = _split(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InvalidRequestError(
                "url may hold scheme, host, port and path only.", param="url", hint="Give a key with --api-key."
            )
        if api_key is not None and (not api_key or not api_key.isascii() or any(c.isspace() for c in api_key)):
            raise InvalidRequestError("api_key must be ASCII text without spaces.", param="api_key")
        default_port = 443 if parts.scheme == "https" else 80
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.scheme, parts.hostname or "", port or default_port, path, api_key)

    @property
    def url(self) -> str:
        """The address as text, without the key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries. No compression: a compressed stream would arrive in lumps."""
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {"Content-Type": "application/json", "Accept-Encoding": "identity", **key}


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise InvalidRequestError(f"url is not well formed: {shown(url)}.", param="url", hint=HINT) from None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or not is_plain:
        raise InvalidRequestError(f"url must begin with http:// or https://, not {shown(url)}.", param="url", hint=HINT)
    return parts, port
