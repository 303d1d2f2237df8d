"""The application: which path is answered by whom, behind the gate.

What it is: the table of routes, and how the parts of a server are put together. What it
knows nothing about: sockets, signals. Invariant: every route of the server is in `ROUTES`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from starlette.applications import Starlette
from starlette.routing import Route

from nanovllm.config import EngineConfig, parse_bytes
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.serve import conversations, health, knowledge_api, responses, state_api
from nanovllm.serve.admission import Admission
from nanovllm.serve.chat import chat
from nanovllm.serve.completions import completions
from nanovllm.serve.config import Limits, ServerConfig
from nanovllm.serve.context import Services
from nanovllm.serve.dashboard.feed import FEED_PATH, Feed, events
from nanovllm.serve.dashboard.pages import PAGES
from nanovllm.serve.gate import Gate
from nanovllm.serve.knowledge import Knowledge
from nanovllm.serve.metrics import ServerMetrics
from nanovllm.serve.models_page import model, models
from nanovllm.serve.openapi import openapi
from nanovllm.serve.tenants import Tenants
from nanovllm.serve.tokenize import detokenize, tokenize
from nanovllm.serve.tracing import open_traces
from nanovllm.serve.turn_store import TurnStore

POOL_THREADS = 4  # for tokenizing and for parsing large bodies
ROUTES = (
    Route("/health", health.health),
    Route("/health/ready", health.ready),
    Route("/ping", health.health),
    Route("/version", health.version),
    Route("/metrics", health.metrics),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/openapi.json", openapi),
    Route(FEED_PATH, events),
    *PAGES,
    *responses.ROUTES,
    *conversations.ROUTES,
    *knowledge_api.ROUTES,
    *state_api.ROUTES,
)


def build_services(engine_config: EngineConfig, config: ServerConfig, limits: Limits) -> Services:
    """The parts of one server; its engine is not started yet. Raises ConfigError."""
    tenants = Tenants(config)  # first: bad keys are heard of before anything is made
    engine_config = with_room(engine_config, config)
    engine = AsyncEngine(engine_config, in_process_of_its_own=config.engine_process)
    admission = Admission(config, lambda: engine.stats.prefill_tokens_per_s)
    pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="nanovllm-serve")
    metrics = ServerMetrics(
        engine,
        prefix=config.metrics_prefix,
        model_name=next(iter(config.served_model_name), None),
        rejections=lambda: admission.rejected,
    )
    services = Services(engine, config, limits, tenants, admission, pool, metrics, open_traces(config))
    services.feed = Feed(services)
    is_one = config.share_prefix or not tenants.has_keys
    services.knowledge = Knowledge(engine, is_one, config.request_timeout)
    services.turns = TurnStore(engine, config)
    return services


def with_room(engine_config: EngineConfig, config: ServerConfig) -> EngineConfig:
    """The engine's settings, with no ceiling below what the server's own flags allow a key."""
    most = parse_bytes(engine_config.state_tenant_bytes, "state_tenant_bytes")
    return replace(
        engine_config,
        state_tenant_objects=max(engine_config.state_tenant_objects, config.max_tenant_sessions),
        state_tenant_bytes=max(most, config.max_tenant_session_bytes),
    )


def build_app(services: Services) -> Gate:
    """The ASGI application."""
    app = Starlette(routes=list(ROUTES))
    app.router.redirect_slashes = False  # a redirect would be made from the Host header
    app.state.services = services
    return Gate(app, services, frozenset(route.path for route in ROUTES if "POST" in (route.methods or ())))
