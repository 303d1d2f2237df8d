"""Health, version and metrics: what operators and their machines ask.

What it is: five small endpoints. What it knows nothing about: requests, who asks.
Invariants: /health says whether to restart the process, /health/ready whether to send
it requests; both answer at once, whatever the engine does.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm import __version__
from nanovllm.serve.context import Services
from nanovllm.serve.failures import NotFoundError

RETRY_S = 1


async def health(request: Request) -> Response:
    """200 while the engine's loop turns, or loads for the first time; 503 where it is gone or fails."""
    services: Services = request.app.state.services
    state = services.state
    if state == "loading" and services.is_loaded:
        return _answer(503, "restarting")
    if state == "loading":
        return _answer(200, "loading")
    if state in ("unhealthy", "dead"):
        return _answer(503, state)
    hangs = services.engine.heartbeat_age_s > services.config.heartbeat_age
    return _answer(503, "hanging") if hangs else _answer(200, "ok")


async def ready(request: Request) -> Response:
    """200 where a request would be taken now: loaded, not draining, alive, the last step good."""
    services: Services = request.app.state.services
    engine = services.engine
    if services.state != "ready":
        return _answer(503, services.state)
    if engine.heartbeat_age_s > services.config.heartbeat_age:
        return _answer(503, "hanging")
    return _answer(503, "failing") if engine.stats.bad_steps_in_a_row else _answer(200, "ready")


async def version(request: Request) -> Response:
    """The package's version."""
    return Response(msgspec.json.encode({"version": __version__}), media_type="application/json")


async def metrics(request: Request) -> Response:
    """What the server counts, in Prometheus' text format."""
    services: Services = request.app.state.services
    if services.metrics is None:
        raise NotFoundError("This server keeps no metrics.")
    page, content_type = services.metrics.render()
    return Response(page, headers={"content-type": content_type})


def _answer(status: int, state: str) -> Response:
    headers = {} if status == 200 else {"retry-after": str(RETRY_S)}
    return Response(msgspec.json.encode({"status": state}), status, headers, "application/json")
