"""Work on a file system that is really full, and then really read-only. Run in a mount namespace of its own.

`python -m tests.state.small_disk_child MOUNT`: MOUNT is a tmpfs of 2 MiB, which the state folder believes to be larger.
Prints one JSON line of what was seen; any assertion fails the test that runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nanovllm.errors import StateFolderError, StateRefusedError
from nanovllm.state.breaker import SECOND
from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.disk import DiskTier
from tests.state.stores import SETTINGS, World, blocks_for, check_books, loaded, spill

PROMPT = list(range(16))
KIB = 1024


def talk(text: str) -> Session:
    return Session([{"role": "user", "content": text}], [1, 2, 3, 4])


def filled_up(mount: Path, percent: int) -> Path:
    """A file that takes the file system to `percent` of its size."""
    room = os.statvfs(mount)
    used = (room.f_blocks - room.f_bfree) * room.f_frsize
    filler = mount / "filler"
    filler.write_bytes(bytes(max(0, room.f_blocks * room.f_frsize * percent // 100 - used)))
    return filler


def fill(store: StateStore, model: dict[str, Session]) -> tuple[int, int]:
    """Put texts and spill KV until the disk takes no more; how many puts and spills were refused."""
    refused_texts = refused_blocks = 0
    for i in range(60):
        try:
            model[store.put(talk(f"{i} " * 4 * KIB))] = talk(f"{i} " * 4 * KIB)
        except StateRefusedError as error:
            assert "No space left" in error.message or "full" in error.message, error.message
            refused_texts += 1
        refused_blocks += not spill(store, blocks_for(store, [i, *range(60)]), "disk")
        store.plane.clock.advance(SECOND)
    return refused_texts, refused_blocks


def check(store: StateStore, model: dict[str, Session]) -> None:
    store.settle()
    assert {state_id: store.get(state_id) for state_id in model} == model, "acknowledged and lost"
    assert loaded(store, blocks_for(store, PROMPT)) == 4
    for i in range(60):
        loaded(store, blocks_for(store, [i, *range(60)]))  # right, or a miss
    check_books(store)


def fill_to(world: World, mount: Path, percent: int) -> list[int]:
    """At so much full the rest fills up, refusals begin, nothing is lost; with room again it is written to again."""
    store, model = world.open(), {}
    model[store.put(talk("first"))] = talk("first")
    spill(store, blocks_for(store, PROMPT), "disk")
    filler = filled_up(mount, percent)
    refused = fill(store, model)
    assert min(refused) > 0 and os.statvfs(mount).f_bfree < 32, "it was not full"
    check(store, model)
    filler.unlink()
    store.plane.clock.advance(31 * SECOND)
    model[store.put(talk("room again"))] = talk("room again")
    store.close()
    store = world.open()
    check(store, model)
    for state_id in model:
        store.drop(state_id)
    store.evict(tier="disk", bytes=8 << 20)
    store.close()
    return list(refused)


def on_a_read_only_file_system(world: World, mount: Path) -> str:
    """An owner is refused with a sentence; a reader reads."""
    store = world.open()
    kept = store.put(talk("kept"))
    spill(store, blocks_for(store, PROMPT), "disk")
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    try:
        world.open()
        raise AssertionError("a read-only file system was taken for a folder of one's own")
    except StateFolderError as error:
        message = error.message
    assert world.folder is not None
    tier = DiskTier(world.folder, 1 << 20, read_only=True)
    reader = StateStore([tier], settings=SETTINGS, threads=False, model="m", clock=world.clock, wall_ms=world.wall)
    assert reader.get(kept) == talk("kept") and loaded(reader, blocks_for(reader, PROMPT)) == 4
    reader.close()
    return message


def main() -> None:
    mount = Path(sys.argv[1])
    world = World(mount / "state", host_bytes=0, disk_bytes=64 << 20)
    refused = {percent: fill_to(world, mount, percent) for percent in (50, 95, 99, 100)}
    print(json.dumps({"refused": refused, "read_only": on_a_read_only_file_system(world, mount)}))


if __name__ == "__main__":
    main()
