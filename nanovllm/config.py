"""Engine settings: one frozen dataclass, checked when it is made.

What it is: the place where keywords, or a file, environment variables and flags,
become an `EngineConfig`. `from_kwargs` takes a program's keywords as they are; `load`
merges for the command line, later sources winning: defaults < file < `NANOVLLM_*` < flag.
What it knows nothing about: models, torch, what a setting does.
Invariants: a constructed config is valid; an unknown key is an error that names
the nearest known one; nothing is dropped silently.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError, shown

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("int8",)
KERNELS = ("auto", "reference", "cpu", "compiled", "cuda")
PREFIX_MODES = ("off", "observe", "reuse")
SCHEDULE_MODES = ("mixed", "separate")
POLICIES = ("fcfs", "priority", "sjf")
STATE_LOADS = ("auto", "always", "never")
LOGGED_CALLS = ("can_allocate", "allocate", "deallocate")
LIMITS = {"event_capacity": 2**24, "num_blocks": 2**22, "num_threads": os.cpu_count() or 1}
SERVER_TABLE = "server"  # the table of a settings file that nanovllm.serve.config reads
ADDRESSES = ("state_remote",)  # may hold a password: `masked` before they are shown
ALIASES = {"kvcache_block_size": "block_size", "num_kvcache_blocks": "num_blocks"}
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_ADDRESS = re.compile(r"(\w+://)([^@/?]*@)?((?:[\w.-]+|\[[\da-fA-F:]+\])?(?::\d+)?(?:/[^@?]*)?)(\?.*)?")


def _setting(default: Any, help_text: str, *, is_shown: bool = True) -> Any:
    return field(default=default, repr=is_shown, metadata={"help": help_text})


def masked(address: str) -> str:
    """An address as it may be shown: user, password and query are stars, and one that is none is not shown at all."""
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        return "set"
    scheme, user, place, query = parts.groups()
    return f"{scheme}{'***@' if user else ''}{place}{'?***' if query else ''}"


@dataclass(frozen=True)
class EngineConfig:
    """Every setting of one engine. `None` means: decided at start from the model and the machine."""

    model: str = _setting("smollm2", "directory, .gguf file, hub id, alias or tiny:random")
    dtype: str = _setting("auto", "auto, float32 or bfloat16; auto takes bfloat16 where the hardware has it")
    device: str = _setting("auto", "auto, cpu or cuda")
    kernels: str = _setting("auto", "auto, reference (plain torch), cpu, compiled (C, and cpu for the rest) or cuda")
    quantization: str | None = _setting(None, "int8: weights of linears as 8-bit codes; default: as the model has them")
    block_size: int = _setting(16, "tokens a KV block holds, from 1 up")
    kv_memory: int | str | None = _setting(None, "KV pool budget, bytes or '2GiB'; default: sized from free memory")
    num_blocks: int | None = _setting(None, "KV blocks in the pool; overrides kv_memory")
    gpu_memory_utilization: float = _setting(0.9, "share of GPU memory to use; has effect on cuda only")
    max_model_len: int | None = _setting(None, "longest prompt plus output, tokens")
    max_num_seqs: int = _setting(64, "sequences one step may run")
    max_num_batched_tokens: int = _setting(2048, "tokens one step may compute")
    schedule_mode: str = _setting("mixed", "mixed: prefill beside decode; separate: one or the other per step")
    policy: str = _setting("fcfs", "fcfs, priority or sjf (shortest first)")
    max_new_requests_per_step: int | None = _setting(None, "requests one step may admit")
    prefill_during_decode: bool = _setting(True, "admit and prefill while others decode")
    max_prefill_chunk: int | None = _setting(None, "longest prefill chunk of one sequence per step, tokens")
    max_prefill_beside_decode: int = _setting(512, "prefill tokens a step may compute while others decode in it")
    watermark: float = _setting(0.01, "share of the pool kept free at admission")
    prefix_mode: str = _setting("reuse", "off, observe (report potential hits only) or reuse")
    state_dir: str | None = _setting(None, "folder for state that survives a restart: texts, and KV written behind")
    state_host_memory: int | str | None = _setting(None, "memory for KV that left the device; default: none is kept")
    state_disk_quota: int | str = _setting("4GiB", "how much the state folder may hold")
    state_tenant_objects: int = _setting(10_000, "objects of one kind that one tenant may keep")
    state_tenant_bytes: int | str = _setting("1GiB", "text, messages and token ids of one kind, of one tenant")
    state_remote: str | None = _setting(
        None, "a Valkey or Redis server that engines share, such as redis://host:6379", is_shown=False
    )
    state_remote_key_file: str | None = _setting(None, "file of the secret that signs what lies on that server")
    state_load: str = _setting("auto", "auto: bring KV up where that is cheaper than computing; always or never")
    seed: int = _setting(0, "seed of requests that bring none, and of tiny:random weights")
    num_threads: int | None = _setting(None, "CPU threads for kernels; belongs to the process")
    enforce_eager: bool = _setting(True, "accepted, as upstream; no graph is captured either way, so it has no effect")
    tensor_parallel_size: int = _setting(1, "only 1 is implemented")
    check_invariants: bool = _setting(False, "verify the engine's books after every step; slow, for debugging")
    event_capacity: int = _setting(65536, "events kept on the bus before the oldest are dropped")
    log_blocks: str | None = _setting(None, "block calls to log: can_allocate, allocate, deallocate, between commas")
    time_blocks: bool = _setting(False, "measure the time in block calls per step, for recordings")

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "event_capacity", "state_tenant_objects"):
            self._at_least_one(name, getattr(self, name))
        self._at_least_one("max_prefill_beside_decode", self.max_prefill_beside_decode)
        for name in ("num_blocks", "max_model_len", "max_new_requests_per_step", "max_prefill_chunk", "num_threads"):
            if getattr(self, name) is not None:
                self._at_least_one(name, getattr(self, name))
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_share("watermark", self.watermark)
        _check_share("gpu_memory_utilization", self.gpu_memory_utilization)
        for f in fields(self):
            if f.type == "bool" and not isinstance(getattr(self, f.name), bool):
                raise ConfigError(f"{f.name} must be true or false, not {shown(getattr(self, f.name))}.", param=f.name)
        if type(self.tensor_parallel_size) is not int or self.tensor_parallel_size != 1:
            raise ConfigError(
                "tensor_parallel_size must be 1.",
                param="tensor_parallel_size",
                hint="Tensor parallelism is not implemented; remove the setting.",
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must be an integer in [0, 2**64), not {shown(self.seed)}.", param="seed")
        self.kv_memory_bytes  # noqa: B018  (parses, so that a bad size is refused here)
        for name in self.logged_block_calls:
            _check_choice("log_blocks", name, LOGGED_CALLS)
        for name in ("state_host_memory", "state_disk_quota", "state_tenant_bytes"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name), name)
        for name in ("state_dir", "state_remote", "state_remote_key_file"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} must be a text, not {shown(value)}.", param=name)

    @property
    def kv_memory_bytes(self) -> int | None:
        """The KV budget in bytes, or None where it is to be sized from free memory."""
        return None if self.kv_memory is None else parse_bytes(self.kv_memory, "kv_memory")

    @property
    def logged_block_calls(self) -> list[str]:
        """The block calls that `log_blocks` names."""
        return [part.strip() for part in (self.log_blocks or "").split(",") if part.strip()]

    @classmethod
    def from_kwargs(cls, model: str | os.PathLike[str], **kwargs: Any) -> EngineConfig:
        """Build from Python keywords; `use_tqdm` is known from upstream and belongs to `generate`."""
        if not isinstance(model, str | os.PathLike) or not isinstance(os.fspath(model), str):
            raise ConfigError(f"model must be a name or a path, not {shown(model)}.", param="model")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("use_tqdm", "model")}
        return cls(model=os.fspath(model), **_checked(_without_aliases(kwargs)))

    @classmethod
    def load(
        cls, flags: Mapping[str, Any], *, file: Path | None = None, env: Mapping[str, str] = os.environ
    ) -> tuple[EngineConfig, dict[str, str]]:
        """Merge file, environment and flags; also return the source of each setting that is not a default."""
        merged: dict[str, Any] = {}
        sources: dict[str, str] = {}
        own = {key: value for key, value in read_toml(file).items() if key != SERVER_TABLE}
        for source, values in (("file", own), ("environment", _read_env(env)), ("flag", flags)):
            for key, value in _checked(_without_aliases(values)).items():
                merged[key], sources[key] = value, source
        return cls(**merged), sources

    @staticmethod
    def _at_least_one(name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LIMITS.get(name, 2**31):
            most = LIMITS.get(name, 2**31)
            raise ConfigError(f"{name} must be an integer from 1 to {most}, not {shown(value)}.", param=name)


_CHOICES = {
    "dtype": DTYPES,
    "device": DEVICES,
    "kernels": KERNELS,
    "prefix_mode": PREFIX_MODES,
    "schedule_mode": SCHEDULE_MODES,
    "policy": POLICIES,
    "state_load": STATE_LOADS,
}


def parse_bytes(value: int | str, param: str) -> int:
    """Bytes of `2147483648`, `"2GiB"`, `"512 MB"`. Raises ConfigError on anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", value if isinstance(value, str) else "")
        if not found or found[2].lower() not in _UNITS:
            raise ConfigError(
                f"{param} must be a size such as '2GiB' or a number of bytes, not {shown(value)}.", param=param
            )
        size = int(float(found[1]) * _UNITS[found[2].lower()])
    if size < 1:
        raise ConfigError(f"{param} must be more than 0 bytes.", param=param)
    return size


def unknown_key(key: str, known: list[str], what: str) -> ConfigError:
    """The error for a key nobody knows; it names the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
    return ConfigError(f"{what} {key!r} is unknown.", param=key, hint=hint)


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    known = [f.name for f in fields(EngineConfig)]
    for key in values:
        if key not in known:
            raise unknown_key(key, [*known, *ALIASES], "Setting")
    return dict(values)


def _without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    for alias, name in ALIASES.items():
        if alias in values and name in values:
            raise ConfigError(f"{alias} and {name} are one setting.", param=alias, hint="Give one of them.")
    return {ALIASES.get(key, key): value for key, value in values.items()}


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {shown(value)}.", param=name)


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, not {shown(value)}.", param=name)


def read_toml(path: Path | None) -> dict[str, Any]:
    """The settings file as it is written; without one, nothing. Raises ConfigError."""
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The settings file {path} cannot be read: {error}.", param="config") from error


def env_name(name: str) -> str:
    """The environment variable of a setting."""
    return f"NANOVLLM_{name.upper()}"


def _read_env(env: Mapping[str, str]) -> dict[str, Any]:
    """`NANOVLLM_BLOCK_SIZE=32` sets block_size; variables that name no setting are left to others."""
    found: dict[str, Any] = {}
    for f in fields(EngineConfig):
        text = env.get(env_name(f.name))
        if text is not None:
            try:
                found[f.name] = parse_setting(f.name, text)
            except ConfigError:
                raise ConfigError(f"{env_name(f.name)} cannot be read from {shown(text)}.", param=f.name) from None
    return found


def parse_setting(name: str, text: str) -> Any:
    """The value of one engine setting given as text, by the type its field is annotated with."""
    return parse_text(next(str(f.type) for f in fields(EngineConfig) if f.name == name), name, text)


def parse_text(kind: str, name: str, text: str) -> Any:
    """`text` as the annotated type `kind` says; a tuple's parts stand between commas. Raises ConfigError."""
    try:
        if kind.startswith("bool"):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if kind.startswith("tuple"):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if kind.startswith(("int | str", "str")):
            return text
        return float(text) if kind.startswith("float") else int(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name} cannot be read from {text!r}.", param=name) from None
