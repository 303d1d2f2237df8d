"""`nanovllm trace record`: a workload of the lab served by one engine and recorded, for the other verbs of `trace`.

What it is: the verb. What it knows nothing about: how workloads are made, what recordings
mean. Invariants: the same workload and seed send the same requests whatever the engine's
settings, so that two recordings can be compared; MODEL `simulated` is no model but a cost
table under a virtual clock, the same to the nanosecond on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanovllm.cli.flags import Setup, flag_of, with_engine_flags
from nanovllm.cli.session import command_of, interruptible, open_llm
from nanovllm.cli.terminal import harmless
from nanovllm.errors import ConfigError, InvalidRequestError
from nanovllm.observe.recording_writer import JsonlWriter

if TYPE_CHECKING:  # the engine brings torch, which --help must not wait for
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.outputs import StepOutput
    from nanovllm.lab.workload_run import WorkloadRun
    from nanovllm.lab.workloads import Workload

SIMULATED, SIMULATED_BLOCKS, SIMULATED_TOKEN_BYTES = "simulated", 256, 23_040
HEARD = frozenset(  # settings that mean something without a model
    {
        "block_size",
        "event_capacity",
        "max_model_len",
        "max_new_requests_per_step",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_prefill_beside_decode",
        "max_prefill_chunk",
        "num_blocks",
        "policy",
        "prefill_during_decode",
        "prefix_mode",
        "schedule_mode",
        "watermark",
    }
)
NAMES = "short_ctx, long_ctx, mixed_ctx, rag, agent, multi_turn, multi_tenant or bursty."
AfterStep = Callable[["list[StepOutput]"], None]


def _knob(flag: str, text: str, **bounds: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Workload", show_default=False, **bounds)


@with_engine_flags
def record(
    workload: Annotated[str, typer.Argument(metavar="WORKLOAD", help=NAMES)],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for run, or 'simulated': no model, virtual time.")],
    *,
    sessions: Annotated[int | None, _knob("--sessions", "Requests, or conversations.", min=1, max=10**5)] = None,
    concurrency: Annotated[int | None, _knob("--concurrency", "So many at a time.", min=1, max=10**5)] = None,
    rate: Annotated[float | None, _knob("--rate", "Arrivals a second; else all at once.", min=1e-6)] = None,
    length: Annotated[int | None, _knob("--length", "Prompt tokens, on average.", min=1, max=10**6)] = None,
    output_len: Annotated[int | None, _knob("--output-len", "Generated tokens, on average.", min=1, max=10**6)] = None,
    seed: Annotated[int | None, _knob("--seed", "Same seed, same requests.", min=0, max=2**32)] = None,
    setup: Setup,
) -> None:
    """Serve one of the lab's workloads and record it in --events FILE."""
    from nanovllm.lab.workload_run import run_workload
    from nanovllm.lab.workloads import generate

    if setup.events is None:
        raise InvalidRequestError("There is no file to record in.", param="events", hint="Give --events FILE.")
    knobs: dict[str, Any] = {"sessions": sessions, "concurrency": concurrency, "rate": rate, "length": length}
    turned = {k: v for k, v in (knobs | {"output_len": output_len, "seed": seed}).items() if v is not None}
    plan = generate(workload, **turned)
    verb = " ".join(["trace record", workload, *(f"{flag_of(name)} {value}" for name, value in turned.items())])
    opened = _simulated(setup, verb) if model == SIMULATED else _real(model, setup, verb)
    with opened as (engine, after_step):
        run = run_workload(engine, plan, after_step=after_step)
    print(_told(plan, run, setup))


@contextmanager
def _real(model: str, setup: Setup, verb: str) -> Iterator[tuple[LLMEngine, AfterStep]]:
    with open_llm(model, setup, verb) as llm, interruptible(llm):

        def after_step(outputs: list[StepOutput]) -> None:
            for hook in llm.after_step:
                hook()

        yield llm.engine, after_step


@contextmanager
def _simulated(setup: Setup, verb: str) -> Iterator[tuple[LLMEngine, AfterStep]]:
    """Sizes are those of SmolLM2-135M; reuse is on, as in every engine, unless --prefix-mode says otherwise."""
    from nanovllm.engine.run_header import run_header
    from nanovllm.lab.simulated import simulated_engine

    unheard = [name for name in setup.settings if name not in HEARD] + ["log"] * (setup.log is not None)
    if unheard:
        raise ConfigError(f"{flag_of(unheard[0])} means nothing to a simulated engine.", param=unheard[0])
    config = setup.engine_config("tiny:random")
    settings = {name: getattr(config, name) for name in HEARD}
    engine = simulated_engine(**{**settings, "num_blocks": config.num_blocks or SIMULATED_BLOCKS})
    header = run_header(engine, config, command_of(verb, SIMULATED, setup))
    header = replace(header, model=SIMULATED, block_bytes=SIMULATED_TOKEN_BYTES * config.block_size)
    assert setup.events is not None
    with JsonlWriter(engine.events, setup.events, header, blocks=setup.events_blocks) as writer:
        yield engine, lambda outputs: writer.pump()


def _told(plan: Workload, run: WorkloadRun, setup: Setup) -> str:
    ends = f"{len(run.finals)} served, {len(run.refused)} refused, {len(run.skipped)} skipped"
    return harmless(f"{plan.name}: {len(plan.requests)} requests, {ends}; recorded in {setup.events}")
