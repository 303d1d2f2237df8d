"""State planes for tests: small, on a virtual clock, with what a test needs at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.core.clock import VirtualClock
from nanovllm.state.envelope import Label
from nanovllm.state.objects import DEFAULT_NAMESPACE, KVBlock
from nanovllm.state.settings import StateSettings
from nanovllm.state.shelves import place_in_list, shelf_of
from nanovllm.state.steps import finish
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.folder import Folder
from nanovllm.state.tiers.host import HostTier
from tests.state.fake_device import kv_bytes

BLOCK_BYTES = 240
SETTINGS = StateSettings(block_size=4, layout="4x3x2x1x10/bf16", layers=3)


@dataclass
class Wall:
    """A wall clock that stands still until told."""

    ms: int = 1_000_000

    def __call__(self) -> int:
        return self.ms


@dataclass
class World:
    """One folder and its clocks; `open` starts a state plane over it."""

    folder: Path | None
    host_bytes: int = 1 << 20
    disk_bytes: int = 8 << 20
    clock: VirtualClock = field(default_factory=VirtualClock)
    wall: Wall = field(default_factory=Wall)
    folder_class: type[Folder] = Folder

    def open(self, **options: Any) -> StateStore:
        tiers: list[Any] = [HostTier(self.host_bytes)] if self.host_bytes else []
        if self.folder is not None:
            tiers.append(DiskTier(self.folder, self.disk_bytes, folder_class=self.folder_class))
        defaults = {"settings": SETTINGS, "clock": self.clock, "wall_ms": self.wall, "threads": False, "model": "m"}
        return StateStore([*tiers, *options.pop("more_tiers", ())], **{**defaults, **options})


def blocks_for(
    store: StateStore, tokens: Sequence[int], namespace: str = DEFAULT_NAMESPACE, cost_ms: float = 5.0
) -> list[KVBlock]:
    """The KV blocks of a prompt, as the engine would tell of them."""
    chain = store.plane.chain_of(tokens, namespace)
    size = store.plane.settings.block_size
    cuts = [tuple(tokens[i * size : (i + 1) * size]) for i in range(len(chain))]
    return [KVBlock(*row, namespace, cost_ms) for row in zip(chain, (None, *chain), cuts)]


def computed(blocks: Sequence[KVBlock]) -> list[tuple[KVBlock, bytes]]:
    """Blocks with their bytes."""
    return [(block, kv_bytes(block.digest, BLOCK_BYTES)) for block in blocks]


def spill(store: StateStore, blocks: Sequence[KVBlock], tier: str | None = None) -> bool:
    """Write computed blocks to a tier and wait."""
    transfer = store.spill(computed(blocks), tier)
    return transfer is not None and store.plane.mover.wait(transfer).ok


def loaded(store: StateStore, blocks: Sequence[KVBlock]) -> int:
    """How many blocks come back; each that does must be right."""
    load = finish(store.plane.mover, store._migration.fetch(blocks))
    for block, payload in zip(blocks, load.payloads):
        assert payload is None or payload == kv_bytes(block.digest, BLOCK_BYTES), "wrong bytes were read"
    return load.num_blocks


def check_books(store: StateStore) -> None:
    """The plane's own invariants, whatever happened."""
    plane = store.plane
    for place in plane.places.values():
        here = {key for key, entry in plane.catalog.entries.items() if place.name in entry.tiers}
        assert here == {key for key in here if key in place.victims} and len(place.victims) == len(here)
        assert sum(place.by_kind.values()) == sum(plane.catalog.entries[key].size_bytes for key in here)
        assert place.busy_bytes == 0 or plane.mover.num_pending
        homes = [plane.catalog.entries[key] for key in here if plane.catalog.entries[key].home == place.name]
        assert place.texts.total() == sum(entry.size_bytes for entry in homes)
        assert not place.texts_coming.total() or plane.mover.num_pending
        if place.tier.quota_bytes is not None:
            assert place.tier.used_bytes <= place.tier.quota_bytes
    for entry in plane.catalog.entries.values():
        assert entry.tiers or entry.arriving, "an entry that is nowhere"
    for obj in plane.catalog.objects.values():
        for key in plane.catalog.keys_of(obj):
            assert obj.state_id in plane.catalog.owners(key)
    shelves = plane.catalog.shelves._shelves
    assert sorted(shelves) == sorted({shelf_of(obj) for obj in plane.catalog.objects.values()})
    for key, shelf in shelves.items():
        own = [obj for obj in plane.catalog.objects.values() if shelf_of(obj) == key]
        assert shelf.row == sorted(map(place_in_list, own))
        assert shelf.size_bytes == sum(obj.payload_bytes for obj in own)
    owners = {owner for keys in plane.catalog._owners.values() for owner in keys}
    assert owners <= set(plane.catalog.objects)


def label_of(store: StateStore, state_id: str) -> Label:
    """The label under which an object's payload is stored."""
    return store.plane.catalog.entries[store.find(state_id).payload_key].label
