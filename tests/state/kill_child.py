"""What the kill tests kill: a process that works on a state folder and tells its parent, before and after each promise.

Run as `python -m tests.state.kill_child FOLDER SEED POINT HITS`. Each line on stdout is one JSON record: `intend`
before a change of durable state, `acked` after it. The parent keeps them: the oracle lives in another process.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from nanovllm.state.objects import Session
from nanovllm.state.store import StateStore
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.folder import Folder
from nanovllm.state.tiers.host import HostTier
from nanovllm.state.tiers.ledger import Ledger
from tests.state.folders import killing
from tests.state.stores import SETTINGS, blocks_for, spill

STEPS = 400
DISK_BYTES = 2 << 20
MOST_SESSIONS = 300  # half of what a tenant's texts may fill there


def tell(**record: object) -> None:
    print(json.dumps(record), flush=True)


def text_of(rng: random.Random) -> str:
    return f"{rng.random()} " * rng.randint(1, 60)


def open_store(folder: Path, folder_class: type[Folder]) -> StateStore:
    tiers = [HostTier(1 << 18), DiskTier(folder, DISK_BYTES, folder_class=folder_class)]
    return StateStore(tiers, settings=SETTINGS, model="m")


def turn(store: StateStore, rng: random.Random, sessions: list[str], i: int) -> None:
    """One random change. `intend` names what may or may not be there after a kill."""
    choice = rng.random()
    if not sessions or (choice < 0.3 and len(sessions) < MOST_SESSIONS):
        text = text_of(rng)
        tell(intend="put", text=text)
        tokens = [rng.randrange(50) for _ in range(11)]
        state_id = store.put(Session([{"role": "user", "content": text}], tokens), {"name": f"s{i}"})
        tell(acked="put", id=state_id, text=text)
        spill(store, blocks_for(store, tokens), "disk")
        sessions.append(state_id)
    elif choice < 0.3 or 0.55 <= choice < 0.65:
        state_id = sessions.pop(rng.randrange(len(sessions)))
        tell(intend="drop", id=state_id)
        store.drop(state_id)
        tell(acked="drop", id=state_id)
    elif choice < 0.55:
        state_id, text = rng.choice(sessions), text_of(rng)
        tell(intend="update", id=state_id, text=text)
        store.update(state_id, Session([{"role": "user", "content": text}], [4, 5]))
        tell(acked="update", id=state_id, text=text)
    elif choice < 0.95:
        tokens = [rng.randrange(50) for _ in range(40)]
        spill(store, blocks_for(store, tokens), "disk")
        tell(kv=tokens)
    else:
        store.evict(tier="disk", kind="kv", bytes=1 << 16)


def main() -> None:
    folder, seed, point, hits = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    folder_class = Folder if point == "random" else killing(point, hits)
    if point.startswith("ledger."):
        commit = Ledger.commit

        def killed_commit(self: Ledger, *args: object, **named: object) -> None:
            folder_class.reach("ledger.commit:0")
            commit(self, *args, **named)
            folder_class.reach("ledger.commit:1")

        Ledger.commit = killed_commit
    rng = random.Random(seed)
    store = open_store(folder, folder_class)
    sessions = [obj.state_id for obj in store.ls(kind="session")]
    tell(ready=True)
    for i in range(STEPS):
        turn(store, rng, sessions, seed * STEPS + i)
    store.close()
    tell(finished=True)


if __name__ == "__main__":
    main()
