"""Who comes in: every route with every kind of key, hosts and sites, request ids, what failures say."""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.errors import AuthenticationError
from nanovllm.serve.app import ROUTES, build_app, build_services
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.dashboard.feed import FEED_PATH
from nanovllm.serve.gate import OPEN_PATHS
from nanovllm.serve.state_api import IMPORT_PATH, KNOWLEDGE_PATH, STATE_PREFIX
from nanovllm.serve.tenants import Tenants, namespace_of
from tests.serve.servers import CHAT, COMPLETIONS, LiveServer, assert_alive, split, until

Factory = Callable[..., LiveServer]
KEYED = {"api_key": ("alice:user-key-1", "user-key-2"), "admin_key": "admin-key"}
KEYS = {"none": None, "wrong": "user-key-", "user": "user-key-2", "admin": "admin-key"}
CALLS = [
    (method, route.path.replace("{name:path}", "tiny:random"))
    for route in ROUTES
    for method in sorted((route.methods or set()) - {"HEAD"})
    if route.path != FEED_PATH  # it has no end: tests/serve/test_dashboard.py asks it with every kind of key
]


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("who", KEYS)
@pytest.mark.parametrize(("method", "path"), CALLS, ids=[f"{m} {p}" for m, p in CALLS])
def test_every_route_with_every_kind_of_key(server: Factory, method: str, path: str, who: str) -> None:
    live = server(**KEYED)
    live_headers, live.headers = live.headers, {}
    try:
        answer = live.ask(method, path, b"{}" if method in ("POST", "PUT") else None, bearer(KEYS[who]))
    finally:
        live.headers = live_headers
    if path in OPEN_PATHS:
        assert answer.status == 200
    elif who in ("none", "wrong"):
        assert (answer.status, answer.code, answer.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    elif path == "/metrics" and who == "user":
        assert (answer.status, answer.code) == (403, "access_denied")
    elif path.startswith(KNOWLEDGE_PATH):  # every key's own documents
        assert answer.status == (404 if "{name" in path or "tiny" in path else 400 if method == "POST" else 200)
    elif path.startswith(STATE_PREFIX):  # the admin's alone; what is asked for is not there, or {} is enough
        admitted = (415,) if path == IMPORT_PATH else (404, 400) if "{state_id}" in path else (200, 400, 507)
        assert answer.status in ((403,) if who == "user" else admitted), answer.body
    elif method == "GET" and path == "/v1/conversations":  # whose name is asked for
        assert answer.status == 400, answer.body
    elif "_id}" in path:  # of stored turns there are none
        assert answer.status in (404, 400), answer.body
    else:
        empty_is_enough = path == "/v1/conversations"
        assert answer.status == (400 if method == "POST" and not empty_is_enough else 200), answer.body
    assert "x-request-id" in answer.headers


def test_metrics_take_any_key_where_there_is_no_admin_key(server: Factory) -> None:
    live = server(api_key=("only-key",))
    assert live.get("/metrics").status == 200
    assert live.get("/metrics", Authorization="Bearer other").status == 401


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/dashboard/",
        "/invocations",
        "/v1",
        "/health/",
        "/healthz",
        "/docs",
        "//health",
        "//",
    ],
)
def test_unknown_paths_are_closed_too(server: Factory, path: str) -> None:
    live = server(**KEYED)
    assert live.get(path, Authorization="Bearer wrong").status == 401
    assert (live.get(path).status, live.get(path).code) == (404, "not_found")


@pytest.mark.parametrize("path", ["/chat/completions", "/api/chat", "/v1/embeddings", "/v1/chat/completions/"])
def test_a_wrong_path_is_shown_the_way(server: Factory, path: str) -> None:
    answer = server().ask("POST", path, {})
    assert (answer.status, answer.code) == (404, "not_found") and "base URL ends in /v1" in answer.json["error"][
        "message"
    ]


def test_methods_that_are_not_there(server: Factory) -> None:
    live = server(**KEYED)
    answer = live.get(COMPLETIONS)
    assert (answer.status, answer.code, answer.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert live.ask("OPTIONS", COMPLETIONS).status == 405
    assert live.ask("DELETE", "/health").status == 405
    assert live.ask("HEAD", "/health").status == 200


# -- attack 24: the path is the scope's, whatever Host says -----------------------------------------


def ask_gate(host: bytes, path: str, **settings: Any) -> int:
    """The status of a GET at a gate whose address is public, without a socket."""
    services = build_services(*split({"host": "0.0.0.0", **settings}))  # noqa: S104  not bound
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"host", host)], "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    asyncio.run(build_app(services)(scope, receive, send))
    services.pool.shutdown()
    return sent[0]["status"]


@pytest.mark.parametrize("host", [b"a/?x", b"a/health?", b"localhost/health#", b"/health", b"x@localhost", b""])
def test_no_host_header_opens_a_route(host: bytes) -> None:
    assert ask_gate(host, "/v1/models", api_key=("k",)) == 401
    assert ask_gate(host, "/health", api_key=("k",)) == 200


@pytest.mark.parametrize("path", ["/state", "/state/", "/state/objects", "/state/later", "/state/objects/x/pin"])
def test_state_is_closed_by_what_its_path_begins_with(path: str) -> None:
    """To those who are not the admin, to a network where there are no keys, and where no route is."""
    assert ask_gate(b"a", path, api_key=("k",)) == 401
    assert ask_gate(b"a", path, insecure=True) == 403
    assert ask_gate(b"a", path, admin_key="k") == 401


@pytest.mark.parametrize("path", ["/health/../v1/models", "/health/ready/../../metrics", "/v1/models/", "/v1//models"])
def test_no_way_round_through_an_open_path(path: str) -> None:
    assert ask_gate(b"a", path, api_key=("k",)) == 401


# -- attack 25 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["one", "three", "nobody", ""])
def test_all_keys_are_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    tenants = Tenants(ServerConfig(api_key=("one", "two", "three")))
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return real(first, second)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    try:
        tenants.authenticate(b"Bearer " + key.encode())
        assert key in ("one", "three")
    except AuthenticationError:
        assert key in ("nobody", "")
    assert len(compared) == 3
    assert all((len(part) == 32 and key.encode() not in (part, b"")) or not key for pair in compared for part in pair)


@pytest.mark.parametrize(
    "header", [None, b"", b"one", b"Basic one", b"Bearer", b"Bearer one two", b"Bearer\xff", b"Bearerone"]
)
def test_what_is_no_bearer_key(header: bytes | None) -> None:
    with pytest.raises(AuthenticationError):
        Tenants(ServerConfig(api_key=("one",))).authenticate(header)


def test_a_namespace_is_not_the_key() -> None:
    tenants = Tenants(ServerConfig(api_key=("name:secret", "other")))
    tenant = tenants.authenticate(b"bearer secret")
    assert (tenant.name, tenant.is_admin) == ("name", False)
    assert tenant.namespace == namespace_of("secret") != namespace_of("other")
    assert "secret" not in tenant.namespace and len(tenant.namespace) == 32
    assert Tenants(ServerConfig()).authenticate(None).namespace == ""


# -- attack 28: browsers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "[::2]", "127.0.0.1.nip.io"]
)
def test_foreign_hosts_are_refused_on_loopback(server: Factory, host: str) -> None:
    live = server()
    for path in ("/health", "/v1/models", "/version"):
        answer = live.get(path, Host=host)
        assert (answer.status, answer.code) == (403, "access_denied")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_local_hosts_are_served(server: Factory, host: str) -> None:
    assert server().get("/v1/models", Host=host).status == 200


def test_an_allowed_host_is_served(server: Factory) -> None:
    live = server(allowed_host=("llm.example",))
    assert live.get("/v1/models", Host="LLM.example:80").status == 200
    assert live.get("/v1/models", Host="other.example").status == 403
    assert live.get("/v1/models").status == 200


SITES = [
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),  # another port is another site
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({}, 200),
]


@pytest.mark.parametrize(("headers", "status"), SITES, ids=[str(headers) for headers, _ in SITES])
def test_requests_of_other_sites(server: Factory, headers: dict[str, str], status: int) -> None:
    live = server()
    assert live.complete(headers=headers).status == status
    own = {"Origin": f"http://{live.host}:{live.port}", **headers}
    assert live.complete(headers=own).status == status


def test_no_answer_has_a_cors_header(server: Factory) -> None:
    live = server()
    own = {"Origin": f"http://{live.host}:{live.port}"}
    preflight = {**own, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answers = [live.ask("OPTIONS", CHAT, headers=preflight), live.complete(headers=own), live.get("/health", **own)]
    for answer in [*answers, live.get("/nothing"), live.get("/health", Host="evil.example")]:
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers


# -- attack 18: request ids -------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "req-1_2.3", "x" * 128])
def test_a_harmless_request_id_is_echoed(server: Factory, given: str) -> None:
    live = server()
    assert live.complete(headers={"X-Request-Id": given}).headers["x-request-id"] == given
    assert live.get("/nothing", **{"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a;b", "é", "<script>", "../x", "%0a"])
def test_another_request_id_is_replaced(server: Factory, given: str) -> None:
    answer = server().complete(headers={"X-Request-Id": given})
    made = answer.headers["x-request-id"]
    assert answer.status == 200 and made != given and len(made) == 32 and made.isalnum()


def test_the_same_request_id_twice_in_flight(server: Factory) -> None:
    live = server()

    async def both() -> list[Any]:
        ask = [asyncio.to_thread(live.complete, f"p{i}", {"X-Request-Id": "same"}, max_tokens=64) for i in range(8)]
        return await asyncio.gather(*ask)

    answers = asyncio.run(both())
    assert [answer.status for answer in answers] == [200] * 8
    assert {answer.headers["x-request-id"] for answer in answers} == {"same"}
    assert len({answer.json["id"] for answer in answers}) == 8  # what the answer is called is the server's
    assert_alive(live)


# -- attack 29: failures ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("at 0x7f00dead of my-secret-prompt"), KeyError("my-secret-prompt")])
def test_a_failure_says_its_request_id_and_nothing_else(
    server: Factory, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str], error: Exception
) -> None:
    live = server()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(live.services.engine, "submit", fail)
        answer = live.complete("my-secret-prompt", {"X-Request-Id": "mine"})
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.json["error"]["message"] == "The server failed. Request id: mine."
    logged = log()
    assert "mine" in logged and type(error).__name__ in logged and "in _submit" in logged
    assert "my-secret-prompt" not in logged and "dead" not in logged
    assert_alive(live)


def test_an_access_log_has_no_text(server: Factory, log: Callable[[], str]) -> None:
    live = server(access_log=True, api_key=("carol:carols-key",))
    live.complete("my-secret-prompt", {"X-Request-Id": "mine"})
    live.get("/v1/%0amodels?q=my-secret-prompt")
    until(lambda: log().count("/v1/") == 2, "a line is missing")  # it is written after the answer
    lines = log().splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["POST", COMPLETIONS, "200", "carol"],
        ["GET", "/v1/%0amodels", "404", "carol"],
    ]
    assert lines[0].endswith("mine") and "secret" not in log() and "carols-key" not in log()


# -- attack 27: nothing is fetched ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_no_url_is_fetched(server: Factory, kind: str) -> None:
    live = server()
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.3)
        url = f"http://127.0.0.1:{bait.getsockname()[1]}/a.png"
        part = {"type": kind, kind: {"url": url, "file_data": url, "data": url}}
        answer = live.ask("POST", CHAT, {"messages": [{"role": "user", "content": [part]}]})
        assert 400 <= answer.status < 500 and answer.code
        with pytest.raises(TimeoutError):
            bait.accept()
