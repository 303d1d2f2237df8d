"""GET /v1/models and /v1/models/{id}: the one model, under each of its names.

What it is: what clients list to find out what they may ask for. What it knows nothing
about: anything but names. Invariant: every name listed is accepted as `model`.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.errors import ModelNotFoundError
from nanovllm.serve.context import Services
from nanovllm.serve.fields import served_names

OWNER = "nanovllm"


async def models(request: Request) -> Response:
    """All names."""
    services: Services = request.app.state.services
    listed = [_model(name, services) for name in served_names(services)]
    return Response(msgspec.json.encode({"object": "list", "data": listed}), media_type="application/json")


async def model(request: Request) -> Response:
    """One name. Raises ModelNotFoundError."""
    services: Services = request.app.state.services
    name = request.path_params["name"]
    if name not in served_names(services):
        raise ModelNotFoundError(f"The model {name[:100]!r} is not served here.", param="model")
    return Response(msgspec.json.encode(_model(name, services)), media_type="application/json")


def _model(name: str, services: Services) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": services.started_s,
        "owned_by": OWNER,
        "root": served_names(services)[0],
        "parent": None,
        "max_model_len": services.engine.info.max_model_len,
    }
