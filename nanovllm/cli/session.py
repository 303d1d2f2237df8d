"""One engine for the time of a command: opened, watched, interruptible, closed.

What it is: what `run` and `chat` have in common. What it knows nothing about: where
prompts come from. Invariants: Ctrl-C takes effect between two steps, so that the
engine stays whole and the request's blocks come back; logs are complete at the end.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanovllm.cli.flags import Setup, flag_of
from nanovllm.cli.terminal import note, show_log, write_answer
from nanovllm.config import ADDRESSES, EngineConfig, masked
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import ModelFileError, UnsupportedModelError
from nanovllm.observe.lifecycle import LifecycleLog
from nanovllm.observe.recording_writer import JsonlWriter

if TYPE_CHECKING:  # the engine brings torch, which --help must not wait for
    from nanovllm.engine.outputs import RequestOutput
    from nanovllm.llm import LLM


@contextmanager
def open_llm(model: str, setup: Setup, verb: str) -> Iterator[LLM]:
    """The model, ready to answer for `verb`, with the logs that were asked for. Raises NanoVLLMError."""
    config = setup.engine_config(model)  # before torch is imported: bad settings answer at once
    show_log(setup.quiet)
    if sys.stderr.isatty():
        note(f"Loading {config.model} ...", quiet=setup.quiet)
    with _load(config, progress=not setup.quiet) as llm, _watched(llm, setup, verb):
        yield llm


def _load(config: EngineConfig, progress: bool) -> LLM:
    from nanovllm.llm import LLM

    try:
        return LLM.from_config(config, progress=progress)
    except (ModelFileError, UnsupportedModelError) as error:  # loaders see bytes, not what the user typed
        error.param = error.param or f"model {config.model}"
        raise


@contextmanager
def _watched(llm: LLM, setup: Setup, verb: str) -> Iterator[None]:
    """Event logs, pumped after each step and once more at the end."""
    log = LifecycleLog(llm.engine.events, setup.log, sys.stderr) if setup.log else None
    writer = _recorder(llm, setup, verb) if setup.events else None
    readers = [reader for reader in (log, writer) if reader is not None]
    llm.after_step += [reader.pump for reader in readers]
    try:
        yield
    finally:
        for reader in readers:
            reader.pump()
        if writer is not None:
            writer.close()
            lost = writer.dropped + writer.omitted
            note(f"{lost} events are missing from {setup.events}.", quiet=not lost)


def _recorder(llm: LLM, setup: Setup, verb: str) -> JsonlWriter:
    from nanovllm.engine.run_header import run_header

    assert setup.events is not None
    header = run_header(llm.engine, llm.config, command_of(verb, llm.config.model, setup))
    return JsonlWriter(llm.engine.events, setup.events, header, blocks=setup.events_blocks)


def command_of(verb: str, model: str, setup: Setup) -> str:
    """The verb and the settings that were given: what was run, without what was asked or a password."""
    given = {name: masked(value) if name in ADDRESSES else value for name, value in setup.settings.items()}
    settings = [f"{flag_of(name)} {value}" for name, value in given.items()]
    return " ".join(["nanovllm", verb, model, *settings])


@contextmanager
def interruptible(llm: LLM) -> Iterator[None]:
    """Within it, Ctrl-C raises KeyboardInterrupt at the end of the step; a second one, at once."""
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    llm.after_step.append(check)
    try:
        yield
    finally:
        llm.after_step.remove(check)
        signal.signal(signal.SIGINT, before)


def answer(llm: LLM, request: Any, params: SamplingParams, *, shown: bool = True) -> RequestOutput:
    """Stream one answer to stdout and return the finished request. `request`: a prompt or a conversation."""
    final = None
    with interruptible(llm):
        for output in llm.stream(request, params):
            final = output.final
            if shown and output.text:
                write_answer(output.text)
    if final is None:
        raise KeyboardInterrupt  # aborted from outside before its end
    return final
