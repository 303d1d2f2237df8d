"""One benchmark of a server: settings become a plan, the plan a run, the run a document.

What it is: the order of things. What it knows nothing about: how the document is
shown. Invariants: settings are valid once made, and two that contradict each other
are refused, never ignored; the warm-up is in no figure; the key is in no document.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from nanovllm import __version__
from nanovllm.errors import InvalidRequestError
from nanovllm.lab import load, prompts, workload_prompts
from nanovllm.lab.address import Address
from nanovllm.lab.arrivals import arrival_times_ns
from nanovllm.lab.client import first_model
from nanovllm.lab.load_report import report
from nanovllm.lab.outcome import judge
from nanovllm.lab.workloads import Workload
from nanovllm.observe.statistics import parse_slo

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
DEFAULT_REQUESTS, DEFAULT_INPUT_LEN = 100, 128


@dataclass(frozen=True)
class BenchSettings:
    """What the user asked for. None: not given."""

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    endpoint: str = "chat"
    num_requests: int | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    warmup: int = 0
    timeout: float = 300.0
    seed: int = 0
    input_len: int | None = None
    output_len: int = 64
    range_ratio: float | None = None
    prefix_len: int | None = None
    vocab: int | None = None
    workload: str | None = None
    prompts: Path | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    slo: tuple[str, ...] = ()
    slo_ms: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slo_ms", parse_slo(self.slo))
        if self.request_rate is not None and not self.request_rate > 0:
            raise _refused("request_rate", "must be above 0", "Write requests a second, or inf.")
        for name in ("burstiness", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise _refused(name, "must be a number above 0")
        if not 0 <= (self.range_ratio or 0.0) < 1:
            raise _refused("range_ratio", "must be in [0, 1)")
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.concurrency is not None and self.request_rate is not None:
            raise _refused("concurrency", "and request_rate contradict each other", "Give one of them.")
        if self.burstiness != 1.0 and math.isinf(self.rate):
            raise _refused("burstiness", "needs a finite request_rate", "Add --request-rate 4.")
        if self.vocab is not None and self.endpoint != "completions":
            raise _refused("vocab", "needs the completions endpoint", "Add --endpoint completions.")
        made_up = ("input_len", "range_ratio", "prefix_len", "vocab")
        given = [name for name in made_up if getattr(self, name) is not None]
        if self.prompts is not None and (given or self.workload):
            raise _refused(
                [*given, "workload"][0], "has no meaning for prompts of a file", "Leave it out, or --prompts."
            )
        lengths = [name for name in given if name != "vocab"]
        if self.workload is not None and lengths:
            raise _refused(lengths[0], "is a workload's own", "Leave it out, or --workload.")

    @property
    def rate(self) -> float:
        """Arrivals a second of the open loop; infinite in a closed one."""
        return math.inf if self.request_rate is None else self.request_rate

    def as_dict(self) -> dict[str, Any]:
        """For the document: JSON knows no infinity and no paths."""
        shown = {**asdict(self), "prompts": self.prompts and str(self.prompts), "slo": list(self.slo)}
        del shown["slo_ms"]
        if self.concurrency is None and self.workload is None and math.isinf(self.rate):
            shown["request_rate"] = "inf"
        return shown


def measure(
    settings: BenchSettings, api_key: str | None, on_start: Callable[[int], Callable[[], None]]
) -> dict[str, Any]:
    """Run the benchmark. `on_start` gets the number of requests and gives what to call as each ends."""
    load.require_aiohttp()
    address = Address.parse(settings.url, api_key)
    asked = asked_prompts(settings)
    settings = replace(settings, num_requests=len(asked), model=settings.model or first_model(address))
    warmup = _warm_up(address, settings)
    run = load.send(address, plan(settings, asked), on_start(len(asked)))
    outcomes = [judge(exchange) for exchange in run.exchanges]
    workload = planned(settings)
    return {
        "benchmark": "serve",
        "label": "measured",
        "settings": settings.as_dict() | ({} if workload is None else {"knobs": workload.knobs.as_dict()}),
        "versions": versions(run.server),
        "warmup": warmup,
        **report(outcomes, settings.slo_ms, wall_ns=run.wall_ns, cpu_ns=run.cpu_ns),
    }


def planned(settings: BenchSettings) -> Workload | None:
    """The workload that was asked for, with the knobs that were given; output_len is the benchmark's."""
    if settings.workload is None:
        return None
    return workload_prompts.planned(
        settings.workload,
        seed=settings.seed,
        sessions=settings.num_requests,
        concurrency=settings.concurrency,
        rate=settings.request_rate,
        burstiness=None if math.isinf(settings.rate) else settings.burstiness,
        output_len=settings.output_len,
        vocab=settings.vocab,
    )


def asked_prompts(settings: BenchSettings) -> list[prompts.Prompt]:
    """The prompts of the measured run, in order."""
    if workload := planned(settings):
        return workload_prompts.prompts_of(workload, settings.vocab)
    if settings.prompts is None:
        return list(islice(prompts.made_up(shape(settings), settings.seed), settings.num_requests or DEFAULT_REQUESTS))
    found = prompts.from_file(settings.prompts, settings.output_len)
    if settings.endpoint == "completions" and any(_is_conversation(prompt) for prompt in found):
        raise _refused("prompts", "holds messages, which the completions endpoint does not take")
    return prompts.repeated(found, settings.num_requests or len(found))


def shape(settings: BenchSettings) -> prompts.Shape:
    """The lengths of made-up prompts."""
    input_len = settings.input_len or DEFAULT_INPUT_LEN
    return prompts.Shape(
        input_len, settings.output_len, settings.range_ratio or 0.0, settings.prefix_len or 0, settings.vocab
    )


def plan(settings: BenchSettings, asked: list[prompts.Prompt]) -> load.Plan:
    """What to send, and when."""
    bodies = [request_body(settings, prompt, index) for index, prompt in enumerate(asked)]
    path = PATHS[settings.endpoint]
    if settings.concurrency is not None:
        return load.Plan(path, bodies, settings.timeout, concurrency=settings.concurrency)
    if workload := planned(settings):
        return load.Plan(path, bodies, settings.timeout, arrivals_ns=workload_prompts.arrivals_of(workload))
    arrivals_ns = arrival_times_ns(len(asked), settings.rate, settings.burstiness, settings.seed)
    return load.Plan(path, bodies, settings.timeout, arrivals_ns=arrivals_ns)


def request_body(settings: BenchSettings, prompt: prompts.Prompt, index: int) -> dict[str, Any]:
    """The JSON of one request. What is not asked for is not sent: servers refuse fields they do not know."""
    body: dict[str, Any] = {
        "model": settings.model,
        "max_tokens": prompt.output_len,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.endpoint == "completions":
        body["prompt"] = prompt.content
    else:
        body["messages"] = prompt.content if _is_conversation(prompt) else _question(prompt.content)
    if settings.ignore_eos:
        body["ignore_eos"] = True
    if settings.temperature > 0:
        body["seed"] = settings.seed + index
    return body


def versions(server: str) -> dict[str, str]:
    """What took part on this side, and what the server calls itself."""
    return {
        "nanovllm": __version__,
        "python": platform.python_version(),
        "aiohttp": version("aiohttp"),
        "client_machine": f"{platform.system()} {platform.machine()}",
        "server_header": server,
    }


def _warm_up(address: Address, settings: BenchSettings) -> dict[str, int]:
    """Send requests of the same shape, one by one, that are measured nowhere."""
    if not settings.warmup:
        return {"requests": 0, "not_completed": 0}
    if settings.workload is not None:  # another seed: documents and system prompts of its own
        asked = asked_prompts(replace(settings, seed=settings.seed + 2**33, num_requests=settings.warmup))
    elif settings.prompts is None:
        asked = list(islice(prompts.made_up(shape(settings), settings.seed, "warm-up"), settings.warmup))
    else:
        asked = prompts.repeated(prompts.from_file(settings.prompts, settings.output_len), settings.warmup)
    run = load.send(address, plan(replace(settings, request_rate=None, burstiness=1.0, concurrency=1), asked))
    verdicts = [judge(exchange).verdict for exchange in run.exchanges]
    return {"requests": len(verdicts), "not_completed": len(verdicts) - verdicts.count("completed")}


def _is_conversation(prompt: prompts.Prompt) -> bool:
    return isinstance(prompt.content, list) and any(isinstance(item, dict) for item in prompt.content)


def _question(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _refused(name: str, why: str, hint: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {why}.", param=name, hint=hint)
