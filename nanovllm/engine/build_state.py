"""From an `EngineConfig` to the state beneath an engine: its store, its tiers, its verbs.

What it is: wiring. What it knows nothing about: models, requests. Invariants: without settings there is a
small memory for named objects and nothing else, and no block is copied; a folder that cannot be opened stops
the start with its own error; what the store found amiss is logged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from nanovllm.config import EngineConfig, parse_bytes
from nanovllm.core.clock import Clock
from nanovllm.core.digest import Digest, root_digest
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.device_state_tier import DeviceStateTier, engine_namespace
from nanovllm.engine.device_tier import DeviceTier
from nanovllm.engine.step_costs import StepCosts
from nanovllm.engine.tiered_state import TieredState
from nanovllm.errors import ConfigError
from nanovllm.state.kinds.meta import COST_TABLE
from nanovllm.state.learned import Part
from nanovllm.state.settings import StateSettings
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.tier import Tier

logger = logging.getLogger("nanovllm")

MIN_SECRET, MAX_SECRET = 16, 4096
OBJECT_BYTES = 64 << 20  # memory for named objects, where no host memory is given to KV


def build_state(
    config: EngineConfig, blocks: BlockManager, pool: DeviceTier, identity: Mapping[str, object], clock: Clock
) -> TieredState:
    """The state plane of one engine. Raises StateFolderError, TierError."""
    device = DeviceStateTier(blocks, pool, layout_of(pool.pool), pool.pool.shape[1])
    costs = StepCosts()
    host = config.state_host_memory
    store = StateStore.open(
        None if config.state_dir is None else Path(config.state_dir),
        host_bytes=OBJECT_BYTES if host is None else parse_bytes(host, "state_host_memory"),
        disk_bytes=parse_bytes(config.state_disk_quota, "state_disk_quota"),
        remote=_remote(config.state_remote, config.state_remote_key_file),
        device=device,
        settings=StateSettings(
            objects_per_namespace=config.state_tenant_objects,
            text_bytes_per_namespace=parse_bytes(config.state_tenant_bytes, "state_tenant_bytes"),
        ),
        root_of=partial(root_of, identity),
        cost_of=costs.ms,
        clock=clock,
        identity=identity_of(identity, device.layout),
    )
    store.learn(Part(COST_TABLE, costs.record, costs.recall, is_small=True))
    for warning in store.warnings:
        logger.warning("%s", warning)
    kv_tiers = {"host": host, "disk": config.state_dir, "remote": config.state_remote}
    names = tuple(name for name, setting in kv_tiers.items() if setting is not None)
    if names and config.prefix_mode != "reuse":
        logger.warning("prefix_mode is %s: the tiers (%s) keep no KV.", config.prefix_mode, ", ".join(names))
    salted = partial(root_of, identity)
    return TieredState(blocks, device, store, kv_tiers=names, load_mode=config.state_load, costs=costs, root_of=salted)


def root_of(identity: Mapping[str, object], namespace: str, salt: str = "") -> Digest:
    """The root of a namespace's digest chains, as `SequenceFactory` makes it."""
    return root_digest({**identity, "namespace": engine_namespace(namespace), "salt": salt})


def identity_of(identity: Mapping[str, object], layout: str) -> str:
    """Of this machine with this model: what was measured by another one says nothing here."""
    machine = f"{platform.machine()} {platform.processor()} {os.cpu_count()}"
    return root_digest({**identity, "layout": layout, "machine": machine}).hex()


def layout_of(pool: torch.Tensor) -> str:
    """How a block's bytes lie: layers x (k, v) x KV heads x tokens x head dim, and the type of a number."""
    shape = "x".join(map(str, pool.shape[1:]))
    return f"{shape}/{str(pool.dtype).removeprefix('torch.')}"


def _remote(url: str | None, key_file: str | None) -> Tier | None:
    if url is None and key_file is not None:
        raise ConfigError(
            "state_remote_key_file needs state_remote.",
            param="state_remote_key_file",
            hint="Name the server, such as --state-remote redis://host:6379, or leave the key file out.",
        )
    if url is None:
        return None
    try:
        from nanovllm.state.tiers.remote import RemoteTier  # its client is needed by nobody else
    except ImportError as error:
        raise ConfigError(
            "state_remote needs a Redis client, which is not installed.",
            param="state_remote",
            hint="pip install 'nano-vllm-hust[remote]'",
        ) from error
    return RemoteTier(url, mac_key=None if key_file is None else _secret(Path(key_file)))


def _secret(path: Path) -> bytes:
    """A key of fixed length made of the file's contents, of which no more is read than a key may have.

    Raises ConfigError.
    """
    how = "Make one: openssl rand -hex 32 > FILE."
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SECRET + 1)
    except OSError as error:
        why = f"The key file cannot be read: {error.strerror}."
        raise ConfigError(why, param="state_remote_key_file", hint=how) from None
    if len(text) > MAX_SECRET or len(text.strip()) < MIN_SECRET:
        wrong = f"The key file must hold {MIN_SECRET} to {MAX_SECRET:,} bytes."
        raise ConfigError(wrong, param="state_remote_key_file", hint=how)
    return hashlib.sha256(text.strip()).digest()
