"""`nanovllm serve [MODEL]`: the OpenAI-compatible server, until a signal ends it.

What it is: the verb, its flags and what it prints. What it knows nothing about: how
requests are served. Invariants: bad settings, a taken port and a missing key are heard
of before torch is imported; every setting is shown with its source, no key or password ever is;
stdout gets the address and how to try it, stderr the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanovllm.cli.flags import ENGINE_PANEL, Verb, make_flag, setting_flag, with_flags
from nanovllm.cli.run import MODEL_HELP
from nanovllm.cli.terminal import note, show_log
from nanovllm.config import ADDRESSES, EngineConfig, masked, parse_setting
from nanovllm.errors import ModelFileError, UnsupportedModelError
from nanovllm.serve.config import LIMIT_PREFIX, Limits, ServerConfig, load, setting_fields
from nanovllm.serve.config import parse_setting as parse_server_setting

if TYPE_CHECKING:  # the engine brings torch, which --help must not wait for
    from nanovllm.serve.run import HttpServer

EXAMPLES = """Examples:

  nanovllm serve

  nanovllm serve ./model.gguf --port 0 --served-model-name mine

  NANOVLLM_API_KEY=alice:KEY1,bob:KEY2 nanovllm serve smollm2 --host 0.0.0.0 --admin-key KEY3

  nanovllm serve tiny:random --engine-process --shutdown-timeout 10

Every flag has a variable: --max-queued-requests is NANOVLLM_MAX_QUEUED_REQUESTS. In a --config file the \
server's settings are in the table \\[server], its limits in \\[server.limits].

SIGTERM or Ctrl-C: new requests are refused, running ones end; a second one stops at once.
"""
SERVER_PANEL, LIMITS_PANEL = "Server (default < --config file < NANOVLLM_* environment < flag)", "Limits of one request"
SWITCH_INTERVAL_S = (
    0.001  # the loop must not wait Python's 5 ms for the engine's thread at each socket: 2x in rejections
)
_NOT_FLAGS = ("model", "enforce_eager", "tensor_parallel_size")


@dataclass(frozen=True)
class ServeSetup:
    """What the flags said."""

    engine: dict[str, Any]
    server: dict[str, Any]
    config_file: Path | None
    quiet: bool


@dataclass(frozen=True)
class Settings:
    """The settings of all sources, merged, and where each that is not a default came from."""

    engine: EngineConfig
    server: ServerConfig
    limits: Limits
    sources: Mapping[str, str]

    @classmethod
    def load(cls, model: str | None, setup: ServeSetup) -> Settings:
        """Raises ConfigError."""
        flags = setup.engine if model is None else {"model": model, **setup.engine}
        engine, engine_sources = EngineConfig.load(flags, file=setup.config_file)
        server, limits, sources = load(setup.server, file=setup.config_file)
        return cls(engine, server, limits, engine_sources | sources)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, value and source of every setting."""
        for config, prefix in ((self.engine, ""), (self.server, ""), (self.limits, LIMIT_PREFIX)):
            for f in fields(config):
                name = prefix + f.name
                yield name, _shown(f, getattr(config, f.name)), self.sources.get(name, "default")


def with_serve_flags(verb: Verb) -> Verb:
    """Give `verb` a flag per setting of engine and server; they reach it as `setup: ServeSetup`."""
    engine = [setting_flag(f.name, f, ENGINE_PANEL) for f in fields(EngineConfig) if f.name not in _NOT_FLAGS]
    server = [_server_flag(name, f) for name, f in setting_fields()]
    own = [
        make_flag("config", Path, "TOML file with settings, e.g. block_size = 32.", None, "Output"),
        make_flag("quiet", bool, "Say nothing on stderr but errors.", False, "Output"),
    ]

    def collect(values: dict[str, Any]) -> ServeSetup:
        config_file, quiet = (values.pop(flag.name) for flag in own)
        of_engine = {flag.name: values.pop(flag.name) for flag in engine}
        of_server = {flag.name: values.pop(flag.name) for flag in server}
        return ServeSetup(
            {name: parse_setting(name, text) for name, text in of_engine.items() if text is not None},
            {name: _parsed(name, value) for name, value in of_server.items() if value is not None},
            config_file,
            bool(quiet),
        )

    return with_flags(verb, "setup", [*server, *own, *engine], collect)


def _server_flag(name: str, f: Field[Any]) -> Any:
    panel = LIMITS_PANEL if name.startswith(LIMIT_PREFIX) else SERVER_PANEL
    if f.type == "bool":
        text: str = f.metadata["help"]
        return make_flag(name, bool, text[:1].upper() + text[1:] + ".", None, panel)
    return setting_flag(name, f, panel)


def _parsed(name: str, value: Any) -> Any:
    """Repeated flags come as lists, switches as booleans, the rest as text."""
    if isinstance(value, list):
        return tuple(value)
    return parse_server_setting(name, value) if isinstance(value, str) else value


@with_serve_flags
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=f"{MODEL_HELP} Default: smollm2.", show_default=False)
    ] = None,
    *,
    setup: ServeSetup,
) -> None:
    """Serve MODEL over HTTP, with OpenAI's API, until SIGTERM or Ctrl-C.

    Only this machine reaches it unless --host says otherwise, which needs an API key.
    """
    from nanovllm.serve.listener import bind, check_exposure, with_files_for_connections
    from nanovllm.serve.tenants import Tenants

    settings = Settings.load(model, setup)
    check_exposure(settings.server, Tenants(settings.server).has_keys)
    show_log(setup.quiet)
    _show(settings, quiet=setup.quiet)
    with bind(settings.server) as listener:
        from nanovllm.serve.app import build_services
        from nanovllm.serve.run import HttpServer

        config = with_files_for_connections(settings.server)
        services = build_services(settings.engine, config, settings.limits)
        _run(HttpServer(services, listener), quiet=setup.quiet)


def _run(server: HttpServer, *, quiet: bool) -> None:
    from nanovllm.serve.run import serve_until_signalled

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    model = server.services.engine.config.model
    opening = f"{server.url} is open; loading {model} ..."
    try:
        serve_until_signalled(
            server,
            on_open=lambda: note(opening, quiet=quiet),
            on_ready=lambda: _announce(server),
            on_stop=lambda: _say_draining(server, quiet),
        )
    except (ModelFileError, UnsupportedModelError) as error:  # loaders see bytes, not what the user typed
        error.param = error.param or f"model {model}"
        raise
    note("Stopped.", quiet=quiet)


def _announce(server: HttpServer) -> None:
    """The address, and a line to try it with."""
    services = server.services
    name = (*services.config.served_model_name, services.engine.config.model)[0]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    key = ' -H "Authorization: Bearer $NANOVLLM_API_KEY"' if services.tenants.has_keys else ""
    quoted = body.replace("'", "'\\''")
    print(f"Serving {name} at {server.url}", flush=True)
    print(f"curl {server.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{quoted}'", flush=True)


def _say_draining(server: HttpServer, quiet: bool) -> None:
    live, timeout_s = server.services.engine.num_live, server.services.config.shutdown_timeout
    note(f"Stopping: {live} requests have {timeout_s:g} s to end. Again to stop at once.", quiet=quiet)


def _show(settings: Settings, *, quiet: bool) -> None:
    rows = list(settings.rows())
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in rows]
    note("\n".join(lines), quiet=quiet)


def _shown(f: Field[Any], value: Any) -> str:
    if f.metadata.get("secret"):
        return "not set" if not value else f"{len(value)} set" if isinstance(value, tuple) else "set"
    if f.name in ADDRESSES and value:
        return masked(value)
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if value is None:
        return "none" if f.type == "str | None" else "decided at start"
    return str(value).lower() if isinstance(value, bool) else str(value)
