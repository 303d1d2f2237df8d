"""The gate: who comes in. Every request passes the same steps in the same order.

What it is: one pure ASGI middleware around the routes; `_enter` reads as the list of
its steps. What it knows nothing about: what endpoints do. Invariants: nothing but the
health paths and the dashboard's empty page answers without a key where there are keys; state is the
admin's but for its documents, and without any key this machine's; what is asked is decided on `scope["path"]` alone;
no body is read before a slot was taken; a slot is given back whatever happens; every answer carries
`x-request-id`, every failure has one shape.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
import traceback
from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from nanovllm.errors import AccessError, DrainingError, NanoVLLMError, UnhealthyError
from nanovllm.serve.body import JSON, check_head, estimated_tokens
from nanovllm.serve.context import TICKET, Services, Tenant, Ticket
from nanovllm.serve.dashboard.feed import FEED_PATH
from nanovllm.serve.dashboard.pages import PAGE_PATHS
from nanovllm.serve.failures import (
    HttpError,
    LoadingError,
    MethodNotAllowedError,
    NotFoundError,
    RestartingError,
    body_of,
    headers_of,
    is_internal,
    status_of,
)
from nanovllm.serve.state_api import BINARY, IMPORT_PATH, KNOWLEDGE_PATH, STATE_PREFIX
from nanovllm.serve.tenants import ANONYMOUS

logger = logging.getLogger("nanovllm.serve")
access_logger = logging.getLogger("nanovllm.serve.access")

OPEN_PATHS = frozenset({"/health", "/health/ready", "/ping"}) | PAGE_PATHS
ADMIN_PATHS = frozenset({"/metrics", FEED_PATH})
ENGINELESS_PATHS = OPEN_PATHS | ADMIN_PATHS | {"/version", "/openapi.json"}
GENERATING_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
CONVERSATIONS = "/v1/conversations"  # whatever is below it may take a body
LOCAL_HOSTS = frozenset({b"localhost", b"127.0.0.1", b"[::1]"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,128}")
_SAME_SITE = (None, b"none", b"same-origin")
Headers = Mapping[bytes, bytes]


class Gate:
    """The ASGI application: the steps, then the routes of `app`."""

    def __init__(self, app: Starlette, services: Services, posts: frozenset[str]) -> None:
        """`posts`: the paths that take a body."""
        self._app, self._services, self._posts = app, services, posts
        allowed = {host.lower().encode() for host in services.config.allowed_host}
        own = services.config.host.strip("[]").lower()
        local = LOCAL_HOSTS | {f"[{own}]".encode() if ":" in own else own.encode()}
        self._hosts = allowed | local if services.config.is_loopback else allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Nothing but HTTP is spoken here."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        headers = dict(scope["headers"])
        ticket = Ticket(_request_id(headers), ANONYMOUS, time.monotonic_ns())
        reply = Reply(send, ticket.request_id)
        try:
            self._enter(scope, headers, ticket)
            await self._app.router(scope, receive, reply.send)
        except ClientDisconnect:
            reply.status = reply.status or 499  # nobody is left to answer; the access log says so
        except Exception as error:  # noqa: BLE001  whatever it is, it is answered
            await self._fail(reply, error)
        finally:
            ticket.release()
            if self._services.metrics is not None and reply.status is not None:
                self._services.metrics.answered(reply.status)
            if self._services.config.access_log:
                _log_access(scope, ticket, reply)

    def _enter(self, scope: Scope, headers: Headers, ticket: Ticket) -> None:
        """The steps. Raises what the client is to read."""
        self._check_host(headers)
        _check_site(headers)
        ticket.tenant = self._authenticate(scope["path"], headers)
        self._check_engine(scope)
        if self._takes_body(scope):
            wanted = BINARY if scope["path"] == IMPORT_PATH else JSON
            check_head(headers, self._services.limits.body_bytes, wanted)
            self._admit(scope["path"], headers, ticket)
        scope[TICKET], scope["app"] = ticket, self._app

    def _check_host(self, headers: Headers) -> None:
        """A page elsewhere cannot reach a loopback server under a name of its own (DNS rebinding)."""
        if self._hosts and _host_name(headers.get(b"host", b"")) not in self._hosts:
            raise AccessError("This Host is not served here.", hint="Allow it with --allowed-host NAME.")

    def _authenticate(self, path: str, headers: Headers) -> Tenant:
        """The tenant, on every path that is not open."""
        if path in OPEN_PATHS:
            return ANONYMOUS
        tenants = self._services.tenants
        tenant = tenants.authenticate(headers.get(b"authorization"))
        if path in ADMIN_PATHS and tenants.has_admin and not tenant.is_admin:
            raise AccessError("This needs the admin key.")
        is_all_tenants = path == FEED_PATH or (_is_of_state(path) and not _is_within(path, KNOWLEDGE_PATH))
        if is_all_tenants and tenants.has_keys and not tenant.is_admin:
            raise AccessError("This needs an admin key.", hint="Start the server with --admin-key KEY.")
        if _is_of_state(path) and not tenants.has_keys and not self._services.config.is_loopback:
            raise AccessError("State is not open to a network without keys.", hint="Set --admin-key KEY.")
        return tenant

    def _check_engine(self, scope: Scope) -> None:
        """A model that is not there cannot be asked; a server that drains takes nothing new."""
        state = self._services.state
        if state == "ready" or scope["path"] in ENGINELESS_PATHS:
            return
        retry_after_s = self._services.admission.retry_after_s()
        if state == "loading" and self._services.is_loaded:
            raise RestartingError("The engine has ended and is started again.", retry_after_s=retry_after_s)
        if state == "loading":
            raise LoadingError("The model is loading.", retry_after_s=retry_after_s)
        if self._takes_body(scope):
            if state == "draining":
                raise DrainingError("The server is shutting down.", retry_after_s=retry_after_s)
            raise UnhealthyError("The engine has failed.", hint="Restart the server.")

    def _takes_body(self, scope: Scope) -> bool:
        if _is_of_state(scope["path"]):
            return scope["method"] in ("POST", "PUT")
        return scope["method"] == "POST" and (scope["path"] in self._posts or _is_within(scope["path"], CONVERSATIONS))

    def _admit(self, path: str, headers: Headers, ticket: Ticket) -> None:
        """Take a slot, by an estimate; only what generates waits for prefill."""
        tokens = 0
        if path in GENERATING_PATHS:
            tokens = estimated_tokens(headers, self._services.engine.info.max_model_len)
        ticket.slot = self._services.admission.admit(ticket.tenant, tokens)

    async def _fail(self, reply: Reply, error: Exception) -> None:
        """Answer a failure; one of ours goes to the log, without a word the client wrote."""
        error = _in_our_words(error)
        if is_internal(error):
            _log_failure(reply.request_id, error)
        if reply.status is None:
            await reply.send_failure(error)


class Reply:
    """One answer on its way out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self.status: int | None = None  # once it started

    async def send(self, message: Message) -> None:
        """Pass a message on; the first one gets the request id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), self._id_header]}
        await self._send(message)

    async def send_failure(self, error: Exception) -> None:
        """A whole answer that says what went wrong."""
        body = body_of(error, self.request_id)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers_of(error)]
        await self.send({"type": "http.response.start", "status": status_of(error), "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    @property
    def _id_header(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self.request_id.encode()


def _request_id(headers: Headers) -> str:
    """The client's id if it is harmless, else one of ours. It is for logs; the engine never hears it."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _is_of_state(path: str) -> bool:
    """Closed by what it begins with, so that a route added later is closed as well."""
    return _is_within(path, STATE_PREFIX.rstrip("/"))


def _is_within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}/")


def _check_site(headers: Headers) -> None:
    """Refuse what a browser sends on behalf of a page from elsewhere."""
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    is_foreign = origin is not None and origin.lower().partition(b"://")[2] != host.lower()
    if is_foreign or headers.get(b"sec-fetch-site") not in _SAME_SITE:
        raise AccessError("Requests from other sites are refused.")


def _host_name(host: bytes) -> bytes:
    """`host` without its port, in lower case."""
    host = host.strip().lower()
    return host[: host.find(b"]") + 1] if host.startswith(b"[") else host.partition(b":")[0]


def _in_our_words(error: Exception) -> Exception:
    """The router's failures as ours; others as they are."""
    if not isinstance(error, HTTPException):
        return error
    if error.status_code == 404:
        hint = "A client's base URL ends in /v1; GET /openapi.json lists the paths."
        return NotFoundError("There is nothing at this path.", hint=hint)
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        return MethodNotAllowedError("This path has no such method.", allow=allow, hint=f"It has {allow}.")
    return HttpError(error.detail) if error.status_code < 500 else error


def _log_failure(request_id: str, error: Exception) -> None:
    """Where it happened. What an exception says may quote a prompt, so only our own words are kept."""
    what = error.message if isinstance(error, NanoVLLMError) else type(error).__name__
    where = "".join(traceback.format_tb(error.__traceback__)) if error.__traceback__ else ""
    logger.error("Request %s failed: %s\n%s", request_id, what, where)


def _log_access(scope: Scope, ticket: Ticket, reply: Reply) -> None:
    took_ms = (time.monotonic_ns() - ticket.arrival_ns) / 1e6
    path = scope.get("raw_path", b"").decode("ascii", "replace")
    access_logger.info(
        "%s %s %s %s %.1f ms %s", scope["method"], path, reply.status, ticket.tenant.name or "-", took_ms,
        ticket.request_id,
    )  # fmt: skip
