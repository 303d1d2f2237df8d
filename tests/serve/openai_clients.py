"""OpenAI's client, pointed at a live server; what tests of stored turns ask through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from openai import OpenAI

from tests.serve.servers import ASK_S, LiveServer, ServerProcess
from tests.serve.surface import Live

BLOCK = 16
ASKED = {"model": "tiny:random", "temperature": 0, "max_output_tokens": 12}
# Text that the model's template gives back letter by letter: random bytes and stray control tokens are not.
LETTERS = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "string", "pattern": "^[a-z]{200}$"}}}
Clients = Callable[..., OpenAI]


@pytest.fixture
def clients() -> Iterator[Clients]:
    """`clients(server, key)`: closed at the test's end."""
    with ExitStack() as stack:

        def make(live: LiveServer | ServerProcess | Live, key: str = "unused") -> OpenAI:
            server = live.server if isinstance(live, Live) else live
            url = f"http://{server.host}:{server.port}/v1"
            return stack.enter_context(OpenAI(base_url=url, api_key=key, max_retries=0, timeout=ASK_S))

        yield make


@pytest.fixture
def ai(clients: Clients, tiny: Live) -> OpenAI:
    """A client of the shared tiny server."""
    return clients(tiny)


def ask(ai: OpenAI, said: Any, **more: Any) -> Any:
    """One short turn."""
    return ai.responses.create(**{**ASKED, "input": said, **more})


def own(response: Any) -> dict[str, Any]:
    """This server's own part of the usage."""
    return response.usage.model_extra["nanovllm"]


def texts(ai: OpenAI, conversation_id: str) -> list[str]:
    """What a conversation holds."""
    return [item.content[0].text for item in ai.conversations.items.list(conversation_id, order="asc")]
