"""What gate and surface hand each other: the server's parts, and the ticket of one request.

What it is: plain data. `Services` is one per server, found at `request.app.state.services`;
a `Ticket` is one per request, found at `scope["nanovllm.ticket"]`. What it knows
nothing about: how admission counts, what endpoints do. Invariant: a ticket can be
told anything at any time; its slot keeps the books whole.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # both bring more than a test of the gate needs
    from nanovllm.engine.async_engine import AsyncEngine, State
    from nanovllm.serve.admission import Admission, Slot
    from nanovllm.serve.config import Limits, ServerConfig
    from nanovllm.serve.dashboard.feed import Feed
    from nanovllm.serve.knowledge import Knowledge
    from nanovllm.serve.metrics import ServerMetrics
    from nanovllm.serve.tenants import Tenants
    from nanovllm.serve.tracing import Traces
    from nanovllm.serve.turn_store import TurnStore

TICKET = "nanovllm.ticket"


@dataclass(frozen=True)
class Tenant:
    """Who asks: the holder of one key, or everyone where there are no keys.

    `namespace`: where the KV of its prompts lies, which --share-prefix makes one for all; `owner`: where its named
    state lies, always its own.
    """

    name: str
    namespace: str
    is_admin: bool = False
    owner: str = ""


@dataclass
class Ticket:
    """One request's pass through the server. `slot` is None where the request queues for nothing."""

    request_id: str
    tenant: Tenant
    arrival_ns: int
    slot: Slot | None = None

    def revise(self, prompt_tokens: int, n: int) -> None:
        """The estimate becomes the count: all prompts' tokens, all sequences. Raises BusyError, RateLimitError."""
        if self.slot is not None:
            self.slot.revise(prompt_tokens, n)

    def started(self) -> None:
        """The engine runs it: what it holds leaves the queue."""
        if self.slot is not None:
            self.slot.started()

    def release(self) -> None:
        """The request is over; told by the gate, once or more."""
        if self.slot is not None:
            self.slot.release()


@dataclass
class Services:
    """The parts of one running server."""

    engine: AsyncEngine
    config: ServerConfig
    limits: Limits
    tenants: Tenants
    admission: Admission
    pool: ThreadPoolExecutor
    metrics: ServerMetrics | None = None
    traces: Traces | None = None
    feed: Feed | None = None
    knowledge: Knowledge = field(init=False)
    turns: TurnStore = field(init=False)
    generation_defaults: dict[str, Any] = field(default_factory=dict)  # what the model brings, once it is loaded
    longest_token: int = 256  # letters; no text of more than this times the context fits the model
    started_s: int = field(default_factory=lambda: int(time.time()))
    is_loaded: bool = False  # the engine, its tokenizer and the model's defaults are there

    @property
    def state(self) -> State:
        """The engine's state; "ready" not before everything is there."""
        return "loading" if self.engine.state == "ready" and not self.is_loaded else self.engine.state
