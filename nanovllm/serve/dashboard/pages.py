"""The dashboard's files: one route each, read once.

What it is: the page, its scripts and its style, as they lie beside this module. What it
knows nothing about: the feed, keys. Invariants: what is served was there at start and has
a route of its own, so that no path leads to another file; a page loads nothing from
elsewhere and runs nothing inline, which its policy tells the browser too; nothing in it is secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC = Path(__file__).parent / "static"
INDEX, PREFIX = "index.html", "/dashboard/"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked again each time, and mostly answered with 304
}


def _route(file: Path) -> Route:
    data = file.read_bytes()
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    path = "/" if file.name == INDEX else PREFIX + file.name
    return Route(path, _answering(data, {**HEADERS, "etag": etag, "content-type": TYPES[file.suffix]}))


def _answering(data: bytes, headers: dict[str, str]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        return (
            Response(status_code=304, headers=headers) if headers["etag"] in known else Response(data, headers=headers)
        )

    return answer


PAGES = tuple(_route(file) for file in sorted(STATIC.iterdir()) if file.suffix in TYPES)
PAGE_PATHS = frozenset(route.path for route in PAGES)
