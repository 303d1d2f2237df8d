"""Server settings: two frozen dataclasses, checked when they are made.

What it is: `ServerConfig` says how the server is reached and what it grants, `Limits`
how large one request may be; `load` merges their sources as `EngineConfig.load` does:
defaults < the file's [server] and [server.limits] tables < NANOVLLM_* < flags. What it
knows nothing about: HTTP, the engine. Invariants: a constructed value is valid; an
unknown key is an error that names the nearest; keys are never shown. Times are seconds.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nanovllm.config import SERVER_TABLE, env_name, parse_bytes, parse_text, read_toml, unknown_key
from nanovllm.core.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP, MAX_STOP_BYTES, MAX_STOP_IDS
from nanovllm.errors import ConfigError, shown

LIMIT_PREFIX = "limit_"
_FOREVER_S = 365 * 86_400.0
Loaded = TypeVar("Loaded", "ServerConfig", "Limits")


def _setting(default: Any, help_text: str, least: float = 0, most: float = 2**31, *, secret: bool = False) -> Any:
    return field(
        default=default,
        repr=not secret,
        metadata={"help": help_text, "least": least, "most": most, "secret": secret},
    )


def _seconds(default: float, help_text: str, least: float = 0.001) -> Any:
    return _setting(default, f"{help_text}, seconds", least, _FOREVER_S)


@dataclass(frozen=True)
class Limits:
    """How large one request may be, whoever sends it. What is larger is refused before it costs anything."""

    body_bytes: int = _setting(8 * 2**20, "largest request body, bytes or '8MiB'", 1)
    header_bytes: int = _setting(16 * 2**10, "largest request head, bytes", 1024)
    json_depth: int = _setting(64, "deepest nesting of a body", 4, 512)
    messages: int = _setting(2048, "messages of one conversation", 1)
    knowledge: int = _setting(32, "documents one conversation names", 0, 1024)
    prompts: int = _setting(32, "prompts of one request", 1)
    n: int = _setting(MAX_N, "answers to one prompt", 1, MAX_N)
    stop: int = _setting(MAX_STOP, "stop strings", 0, MAX_STOP)
    stop_bytes: int = _setting(MAX_STOP_BYTES, "longest stop string, bytes", 1, MAX_STOP_BYTES)
    stop_ids: int = _setting(MAX_STOP_IDS, "stop token ids", 0, MAX_STOP_IDS)
    logit_bias: int = _setting(MAX_LOGIT_BIAS, "tokens with a bias", 0, MAX_LOGIT_BIAS)
    logprobs: int = _setting(MAX_LOGPROBS, "top logprobs of a token", 0, MAX_LOGPROBS)
    schema_bytes: int = _setting(64 * 2**10, "largest JSON schema or grammar, bytes", 1)
    schema_depth: int = _setting(32, "deepest nesting of a JSON schema", 1, 512)
    tools: int = _setting(128, "tools one request offers", 0)

    def __post_init__(self) -> None:
        _check(self, LIMIT_PREFIX)


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, whom it lets in, how much it queues, how long it waits."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", 0, 65535)
    api_key: tuple[str, ...] = _setting((), "key a client must send, KEY or NAME:KEY; may be repeated", secret=True)
    api_key_file: str | None = _setting(None, "file of such keys, one a line")
    admin_key: str | None = _setting(None, "key that may also use /metrics, /state and the dashboard", secret=True)
    share_prefix: bool = _setting(False, "let all keys see each other's cached prefixes")
    insecure: bool = _setting(False, "serve a public address without any key")
    allowed_host: tuple[str, ...] = _setting((), "Host header accepted beside localhost; may be repeated")
    served_model_name: tuple[str, ...] = _setting((), "name clients call the model by; may be repeated")
    generation_config: str = _setting("auto", "auto takes sampling defaults from the model's own file; none does not")
    metrics_prefix: str = _setting("nanovllm", "what metric names begin with")
    otlp_endpoint: str | None = _setting(None, "OpenTelemetry collector that gets traces, e.g. http://127.0.0.1:4318")
    engine_process: bool = _setting(False, "run the engine in a process of its own")
    access_log: bool = _setting(False, "one log line per request, without its text")
    max_connections: int = _setting(2048, "connections open at once", 1)
    max_queued_requests: int = _setting(128, "requests that wait for the engine", 1)
    max_queued_tokens: int | None = _setting(None, "prompt tokens that wait; default: ttft_slo times measured speed", 1)
    max_tenant_requests: int = _setting(96, "requests one key may have in flight", 1)
    max_tenant_sessions: int = _setting(10_000, "stored responses and conversations of one key", 0)
    max_tenant_session_bytes: int = _setting(256 * 2**20, "their text together, bytes or '1GiB'", 0, 2**50)
    session_ttl: float = _seconds(30 * 86_400.0, "how long a stored turn is kept")
    write_behind_timeout: float = _seconds(2.0, "longest wait for the KV of a stored or named turn before its end", 0)
    ttft_slo: float = _seconds(30.0, "longest wait for a first token that is worth queueing for")
    queue_timeout: float = _seconds(30.0, "longest wait in the queue")
    request_timeout: float = _seconds(600.0, "longest request, from its arrival on")
    body_timeout: float = _seconds(30.0, "time for a body to arrive")
    header_timeout: float = _seconds(30.0, "time for a request's head to arrive")
    keep_alive_timeout: float = _seconds(60.0, "time an idle connection is kept open")
    write_timeout: float = _seconds(30.0, "time a client may take no byte of its answer")
    heartbeat_interval: float = _seconds(15.0, "pause after which a stream carries a comment")
    heartbeat_age: float = _seconds(5.0, "age at which the engine's heartbeat means it hangs")
    shutdown_timeout: float = _seconds(30.0, "time running requests get to end at shutdown", 0)

    def __post_init__(self) -> None:
        _check(self, "")
        if not self.host or any(letter.isspace() for letter in self.host):
            raise ConfigError(f"host must be an address, not {shown(self.host)}.", param="host")
        if self.generation_config not in ("auto", "none"):
            raise ConfigError(
                f"generation_config must be auto or none, not {shown(self.generation_config)}.",
                param="generation_config",
            )
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]{0,31}", self.metrics_prefix):
            raise ConfigError("metrics_prefix must be a word of letters, digits and _.", param="metrics_prefix")

    @property
    def is_loopback(self) -> bool:
        """True where only this machine can reach the address. A name other than localhost may point anywhere."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def load(
    flags: Mapping[str, Any], *, file: Path | None = None, env: Mapping[str, str] = os.environ
) -> tuple[ServerConfig, Limits, dict[str, str]]:
    """Merge file, environment and flags; also the source of each setting that is not a default.

    In flags and sources the fields of Limits have `limit_` before their names.
    """
    table = _table(read_toml(file), SERVER_TABLE, file)
    limits = _table(table, "limits", file)
    table = {key: value for key, value in table.items() if key != "limits"}
    sources: dict[str, str] = {}
    own_limits = _merged(Limits, LIMIT_PREFIX, limits, flags, env, sources)
    return _merged(ServerConfig, "", table, flags, env, sources), own_limits, sources


def setting_fields() -> list[tuple[str, Field[Any]]]:
    """Every server setting by the name that flags and sources use, limits last."""
    return [(f.name, f) for f in fields(ServerConfig)] + [(LIMIT_PREFIX + f.name, f) for f in fields(Limits)]


def parse_setting(name: str, text: str) -> Any:
    """The value of one setting given as text, as an environment variable or a flag gives it."""
    found = dict(setting_fields())[name]
    return parse_bytes(text, name) if name.endswith("_bytes") else parse_text(str(found.type), name, text)


def _table(within: Mapping[str, Any], name: str, file: Path | None) -> dict[str, Any]:
    found = within.get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name} in {file} must be a table.", param="config")
    return found


def _merged(
    cls: type[Loaded],
    prefix: str,
    table: Mapping[str, Any],
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    sources: dict[str, str],
) -> Loaded:
    known = [f.name for f in fields(cls)]
    for key in table:
        if key not in known:
            raise unknown_key(key, known, f"Setting of [server{'.limits' if prefix else ''}]")
    merged = {key: _from_toml(value) for key, value in table.items()}
    sources |= {prefix + key: "file" for key in table}
    for name in known:
        text = env.get(env_name(prefix + name))
        if text is not None:
            merged[name], sources[prefix + name] = _from_env(prefix + name, text), "environment"
        if prefix + name in flags:
            merged[name], sources[prefix + name] = flags[prefix + name], "flag"
    try:
        return cls(**merged)
    except ConfigError as error:
        if sources.get(error.param or "") != "environment":
            raise
        raise ConfigError(f"{env_name(error.param or '')}: {error.message}", param=error.param) from None


def _from_env(name: str, text: str) -> Any:
    try:
        return parse_setting(name, text)
    except ConfigError:
        is_link = text.startswith("tcp://")
        hint = "Kubernetes sets it for a service of that name; use enableServiceLinks: false." if is_link else None
        raise ConfigError(f"{env_name(name)} cannot be read from {shown(text)}.", param=name, hint=hint) from None


def _from_toml(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(config: ServerConfig | Limits, prefix: str) -> None:
    for f in fields(config):
        value, kind = getattr(config, f.name), str(f.type)
        if value is None and "None" in kind:
            continue
        if kind.startswith("tuple") and isinstance(value, str):
            object.__setattr__(config, f.name, value := (value,))
        _check_kind(prefix + f.name, kind, value)
        if kind.startswith(("int", "float")) and not f.metadata["least"] <= value <= f.metadata["most"]:
            least, most = f.metadata["least"], f.metadata["most"]
            raise ConfigError(
                f"{prefix + f.name} must be from {least} to {most}, not {shown(value)}.", param=prefix + f.name
            )


def _check_kind(name: str, kind: str, value: object) -> None:
    allowed: dict[str, tuple[str, bool]] = {
        "bool": ("true or false", isinstance(value, bool)),
        "int": ("an integer", type(value) is int),
        "float": ("a number", type(value) in (int, float)),
        "str": ("text", isinstance(value, str)),
        "tuple": ("a list of texts", isinstance(value, tuple) and all(isinstance(part, str) for part in value)),
    }
    wanted, is_right = allowed[kind.split(" | ")[0].split("[")[0]]
    if not is_right:
        what = type(value).__name__ if "key" in name else shown(value)
        raise ConfigError(f"{name} must be {wanted}, not {what}.", param=name)
