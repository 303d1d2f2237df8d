"""Flags that verbs share, made from the settings they set.

What it is: one decorator for engine settings, one for sampling. A verb that takes
`setup` gets one flag per `EngineConfig` field; a verb that takes `sampling` gets
those of `SamplingParams`. What it knows nothing about: what a setting does.
Invariants: a flag is spelt like its field, with dashes; a flag that is not given
sets nothing, so that file and environment are heard; values are checked where they
are used, never twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanovllm.config import EngineConfig, parse_setting
from nanovllm.core.sampling_params import SamplingParams

Verb = Callable[..., None]
ENGINE_PANEL = "Engine (default < --config file < NANOVLLM_* environment < flag)"
_NOT_FLAGS = ("model", "seed", "enforce_eager", "tensor_parallel_size")  # seed: the flag is the request's
_SAMPLING: dict[str, tuple[type, Any, str]] = {
    "temperature": (float, 0.0, "0 takes the likeliest token; higher is more varied."),
    "max_tokens": (int, 256, "Longest answer, tokens."),
    "top_p": (float, None, "Keep the likeliest tokens up to this share of probability."),
    "top_k": (int, None, "Keep this many likeliest tokens; 0 keeps all."),
    "min_p": (float, None, "Drop tokens below this share of the likeliest one's probability."),
    "seed": (int, None, "Same seed, same text, whatever runs beside it."),
    "stop": (list[str], None, "Text that ends the answer; may be repeated."),
    "repetition_penalty": (float, None, "Above 1: tokens seen before become less likely."),
    "presence_penalty": (float, None, "Taken off the score of tokens the answer has."),
    "frequency_penalty": (float, None, "The same, times their count in the answer."),
    "min_tokens": (int, None, "Shortest answer, tokens."),
    "ignore_eos": (bool, False, "Go on after the model's end token."),
}


@dataclass(frozen=True)
class Setup:
    """What the engine flags said: settings that were given, and how to report."""

    settings: dict[str, Any]
    config_file: Path | None = None
    log: str | None = None
    events: Path | None = None
    events_blocks: bool = False
    quiet: bool = False

    def engine_config(self, model: str) -> EngineConfig:
        """The settings of all sources, merged. Raises ConfigError."""
        return EngineConfig.load({"model": model, **self.settings}, file=self.config_file)[0]


def with_engine_flags(verb: Verb) -> Verb:
    """Give `verb` the engine's flags; they reach it as `setup: Setup`."""
    settings = [setting_flag(f.name, f, ENGINE_PANEL) for f in fields(EngineConfig) if f.name not in _NOT_FLAGS]
    own = [
        make_flag("config", Path, "TOML file with settings, e.g. block_size = 32.", None, ENGINE_PANEL),
        make_flag(
            "log", Literal["stage", "state", "bench"], "Print the engine's life to stderr, live.", None, "Output"
        ),
        make_flag("events", Path, "Record the run in this file, for nanovllm trace.", None, "Output"),
        make_flag("events_blocks", bool, "Record block events too: which digests came and went.", False, "Output"),
        make_flag("quiet", bool, "Say nothing on stderr but errors.", False, "Output"),
    ]

    def collect(values: dict[str, Any]) -> Setup:
        picked = {flag.name: values.pop(flag.name) for flag in own}
        given = {flag.name: values.pop(flag.name) for flag in settings}
        parsed = {name: parse_setting(name, text) for name, text in given.items() if text is not None}
        return Setup(parsed, config_file=picked.pop("config"), **picked)

    return with_flags(verb, "setup", [*own, *settings], collect)


def with_sampling_flags(verb: Verb) -> Verb:
    """Give `verb` the sampling flags; they reach it as `sampling: SamplingParams`."""
    flags = [make_flag(name, kind, text, default, "Sampling") for name, (kind, default, text) in _SAMPLING.items()]

    def collect(values: dict[str, Any]) -> SamplingParams:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    return with_flags(verb, "sampling", flags, collect)


def with_flags(
    verb: Verb, name: str, flags: list[inspect.Parameter], collect: Callable[[dict[str, Any]], object]
) -> Verb:
    """`verb` with its parameter `name` replaced by `flags`, which `collect` takes out and turns into its value."""

    @wraps(verb)
    def call(**values: Any) -> None:
        values[name] = collect(values)
        verb(**values)

    signature = inspect.signature(verb, eval_str=True)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != name]
    call.__signature__ = signature.replace(parameters=[*kept, *flags])  # type: ignore[attr-defined]
    return call


def make_flag(
    name: str, kind: Any, text: str, default: Any, panel: str, metavar: str | None = None
) -> inspect.Parameter:
    """A keyword parameter that typer reads as the flag; None is what it is when it was not given."""
    shows_default = default is not None and default is not False
    option = typer.Option(flag_of(name), help=text, rich_help_panel=panel, show_default=shows_default, metavar=metavar)
    optional: Any = kind if default is not None else kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[optional, option]
    )


def setting_flag(name: str, field: Field[Any], panel: str) -> inspect.Parameter:
    """The flag of one setting. It arrives as text and is read by the parser that reads the environment."""
    text: str = field.metadata["help"]
    if not text.split()[0].endswith((",", ":")):  # those begin with a value, to be typed as it is written
        text = text[:1].upper() + text[1:]
    default = "" if field.default in (None, ()) else f" (default: {field.default})".lower()
    kind = "size" if name == "kv_memory" else str(field.type).split(" | ")[0].split("[")[0]
    if kind == "tuple":
        return make_flag(name, list[str], text, None, panel, "<text>")
    metavar = "<true|false>" if kind == "bool" else f"<{kind}>"
    return make_flag(name, str, text + default, None, panel, metavar)


def flag_of(name: str) -> str:
    """The flag of a field: `kv_memory` is `--kv-memory`."""
    return "--" + name.replace("_", "-")
