"""Bodies and heads that are too large, too slow, not JSON, or never end."""

from __future__ import annotations

import contextlib
import gzip
import time
from collections.abc import Callable

import pytest

from tests.serve.servers import COMPLETIONS, LiveServer, assert_alive, read_all, read_head

Factory = Callable[..., LiveServer]
SMALL = {"limit_body_bytes": 4096, "body_timeout": 0.5, "header_timeout": 1.0}
JSON = "Content-Type: application/json\r\n"


def head(*lines: str, path: str = COMPLETIONS) -> bytes:
    text = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{JSON}" + "".join(f"{line}\r\n" for line in lines) + "\r\n"
    return text.encode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b"\xff\xfe", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'{"prompt":', 400),
        (b'{"prompt": "a"' + b" " * 4096 + b"}", 413),
        (b"[" * 4000 + b"]" * 90, 400),
    ],
    ids=["empty", "text", "utf-16", "null", "list", "cut", "large", "deep"],
)
def test_bodies_that_are_no_request(server: Factory, body: bytes, status: int) -> None:
    live = server(**SMALL)
    answer = live.ask("POST", COMPLETIONS, body)
    assert answer.status == status and answer.code
    assert_alive(live)


def test_a_hundred_thousand_levels(server: Factory) -> None:
    live = server()
    for body in (b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        assert live.ask("POST", COMPLETIONS, body).status == 400
    assert_alive(live)


def test_a_promised_large_body_is_refused_unread(server: Factory) -> None:
    live = server()
    with live.connect() as sock:
        sock.sendall(head(f"Content-Length: {64 * 2**20}"))  # and not one byte of it
        answer = read_head(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert_alive(live)


def test_a_body_without_length_is_cut_at_the_limit(server: Factory) -> None:
    live = server(**SMALL)
    with live.connect() as sock:
        sock.sendall(head("Transfer-Encoding: chunked"))
        for _ in range(5):
            sock.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert read_head(sock).startswith(b"HTTP/1.1 413 ")
    assert_alive(live)


def test_a_chunked_request_is_served(server: Factory) -> None:
    live = server(**SMALL)
    body = b'{"prompt": "hello", "max_tokens": 2}'
    with live.connect() as sock:
        sock.sendall(head("Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        assert read_head(sock).startswith(b"HTTP/1.1 200 ")


def test_two_framings_at_once_are_refused(server: Factory) -> None:
    """Readers that disagree on where a request ends are what request smuggling lives on."""
    live = server(**SMALL)
    body = b'{"prompt": "hello", "max_tokens": 2}'
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    answer = live.raw(head("Transfer-Encoding: chunked", f"Content-Length: {len(framed)}") + framed)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"connection: close" in answer.lower()
    assert_alive(live)


@pytest.mark.parametrize("framing", ["Content-Length: 4000", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come(server: Factory, framing: str) -> None:
    live = server(**SMALL)
    with live.connect() as sock:
        sock.sendall(head(framing))
        answer = read_all(sock)  # until it is closed: the rest could still come
    assert answer.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in answer and b"connection: close" in answer
    assert_alive(live)


def test_a_byte_now_and_then_buys_no_time(server: Factory) -> None:
    live = server(**SMALL)
    with live.connect() as sock:
        sock.sendall(head("Content-Length: 4000"))
        sock.settimeout(0.1)
        answer = b""
        for _ in range(100):
            try:
                sock.sendall(b" ")
                answer += sock.recv(4096)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")
    assert_alive(live)


@pytest.mark.parametrize("start", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: loc"], ids=["nothing", "half a head"])
def test_a_head_that_does_not_come(server: Factory, start: bytes) -> None:
    live = server(**SMALL)
    with live.connect() as sock:
        sock.sendall(start)
        assert read_all(sock) == b""  # closed
    assert_alive(live)


def test_a_head_that_dribbles(server: Factory) -> None:
    live = server(**SMALL)
    with live.connect() as sock:
        sock.settimeout(0.1)
        is_closed = False
        for _ in range(100):
            try:
                sock.sendall(b"x")
                is_closed = sock.recv(1) == b""
                break
            except TimeoutError:
                continue
            except ConnectionError:
                is_closed = True
                break
        assert is_closed
    assert_alive(live)


def test_the_rest_of_a_refused_body_keeps_no_connection(server: Factory) -> None:
    live = server(**SMALL, keep_alive_timeout=0.5)
    with live.connect() as sock:
        sock.sendall(head("Content-Length: 100000"))
        assert read_head(sock).startswith(b"HTTP/1.1 413 ")
        is_closed = False
        for _ in range(200):
            try:
                sock.sendall(b" ")
            except ConnectionError:
                is_closed = True
                break
            time.sleep(0.05)
        assert is_closed
    assert_alive(live)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "br"}, 415),
        ({"Content-Encoding": "identity"}, 200),
    ],
)
def test_content_headers(server: Factory, headers: dict[str, str], status: int) -> None:
    answer = server().complete(headers=headers)
    assert answer.status == status
    assert status == 200 or answer.code == "unsupported_media_type"


def test_a_gzip_bomb_is_not_unpacked(server: Factory) -> None:
    live = server()
    bomb = gzip.compress(b" " * 2**24)
    assert live.ask("POST", COMPLETIONS, bomb, {"Content-Encoding": "gzip"}).status == 415
    assert_alive(live)


# -- attack 17: heads -------------------------------------------------------------------------------


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
FLOODS = {
    "one header": GET + b"X-Big: " + b"a" * 2**20 + b"\r\n\r\n",
    "many headers": GET + b"X-A: b\r\n" * 10_000 + b"\r\n",
    "target": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "request id": GET + b"X-Request-Id: " + b"a" * 2**20 + b"\r\n\r\n",
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_giant_heads(server: Factory, flood: bytes) -> None:
    live = server()
    with live.connect() as sock:
        sock.sendall(flood[:20_000])  # what follows may find the connection closed, and its answer gone with it
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 431 ") and b'"code":"head_too_large"' in answer
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert b"HTTP/1.1 200" not in live.raw(flood)
    assert_alive(live)


@pytest.mark.parametrize(("size", "status"), [(2**14, b"200"), (2**14 + 1, b"431"), (2**14 + 40_000, b"431")])
def test_a_head_that_comes_whole_is_measured_too(server: Factory, size: int, status: bytes) -> None:
    """In one segment the parser has it whole before it counts; the connection is closed, not left waiting."""
    live = server(keep_alive_timeout=600.0)
    rest = b"Connection: close\r\n" if status == b"200" else b""
    fixed = GET + rest + b"X-A: \r\n\r\n"
    answer = live.raw(fixed[:-4] + b"a" * (size - len(fixed) + len(b"\r\n")) + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status), answer
    assert_alive(live)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR.\r\n\r\n",
    ],
)
def test_what_is_no_http(server: Factory, garbage: bytes) -> None:
    live = server()
    assert live.raw(garbage).startswith(b"HTTP/1.1 400 ")
    assert_alive(live)


def test_a_malformed_chunk(server: Factory) -> None:
    live = server()
    answer = live.raw(head("Transfer-Encoding: chunked") + b"zz\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert_alive(live)


def test_websockets_are_not_spoken(server: Factory) -> None:
    live = server()
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n"
    with live.connect() as sock:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
        assert read_head(sock).startswith(b"HTTP/1.1 200 ")
    assert_alive(live)
