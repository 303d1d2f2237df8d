"""What an engine is made of, and what its callers hand in: records without behaviour.

What it is: `EngineParts`, put together by `build.build_engine` (or by a test, without
tensors), and `RequestArgs`, the keywords of `LLMEngine.add_request`. What it knows
nothing about: what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Required, TypedDict

from nanovllm.core.clock import Clock
from nanovllm.core.events import EventBus
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.exec_batch import Runner
from nanovllm.engine.grammar import GrammarCompiler
from nanovllm.engine.intake import Intake, Prompt
from nanovllm.engine.outputs import RequestOutput
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.tiered_state import TieredState

if TYPE_CHECKING:
    from nanovllm.engine.device_tier import DeviceTier  # the one record with tensors: simulated engines have none


class RequestArgs(TypedDict, total=False):
    """The arguments of `LLMEngine.add_request`."""

    prompt: Required[Prompt]
    sampling_params: SamplingParams | None
    request_id: str | None
    priority: int
    namespace: str
    cache_salt: str
    session_id: str
    session_owner: str
    prefill_only: bool
    template_tokens: int | None
    arrival_ns: int | None


Progress = Callable[[Iterator[RequestOutput]], Iterable[RequestOutput]]


@dataclass
class EngineParts:
    """What an engine is made of; `build.build_engine` puts the real ones together."""

    runner: Runner
    scheduler: Scheduler
    intake: Intake
    tokenizer: Any
    clock: Clock
    events: EventBus
    eos_token_ids: tuple[int, ...] = ()
    identity: dict[str, object] = field(default_factory=dict)
    seed: int = 0
    device_tier: DeviceTier | None = None
    state: TieredState | None = None  # the scheduler's `kv`, where there is a state plane beneath it
    label: str = "measured"
    grammars: GrammarCompiler = field(init=False)

    def __post_init__(self) -> None:
        self.grammars = GrammarCompiler(self.tokenizer, self.eos_token_ids, self.intake.vocab_size)
