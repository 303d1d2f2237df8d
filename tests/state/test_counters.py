"""What a tier's counters say, in all and by kind, after known hits, misses, damage, failures and evictions."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nanovllm.errors import StateNotFoundError, StateRefusedError
from nanovllm.state.counters import OF_A_KIND
from nanovllm.state.objects import Document, Session
from tests.state.folders import failing
from tests.state.stores import World, blocks_for, loaded, spill

TOKENS = list(range(16))
TALK = Session([{"role": "user", "content": "hi"}])


def test_each_kind_has_its_own_and_they_add_up(tmp_path: Path) -> None:
    store = World(tmp_path / "state", host_bytes=0).open()
    store.put(Document("a document", TOKENS), {"name": "doc"})
    session = store.put(TALK)
    owned, plain = blocks_for(store, TOKENS), blocks_for(store, [9, *TOKENS])
    spill(store, owned, "disk")
    spill(store, plain, "disk")
    assert loaded(store, owned) == 4 and loaded(store, plain[:2]) == 2
    store.get("doc", "default")
    (file,) = (path for path in (tmp_path / "state" / "texts").iterdir() if path.name.startswith(session))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(StateNotFoundError):
        store.get(session)
    facts = store.top()["tiers"]["disk"]
    assert {kind: (own["hits"], own["misses"], own["corrupt"]) for kind, own in facts["kinds"].items()} == {
        "knowledge": (5, 0, 0), "kv": (2, 0, 0), "session": (0, 1, 1),
    }  # fmt: skip
    for name in OF_A_KIND:
        if name != "failures":
            assert sum(own[name] for own in facts["kinds"].values()) == facts[name]
    store.evict(tier="disk", kind="kv", bytes=1)
    assert store.top()["tiers"]["disk"]["kinds"]["kv"]["evicted"] == 1
    store.close()


def test_a_failed_call_stands_under_the_kinds_it_was_for(tmp_path: Path) -> None:
    fails = [False]
    broken = failing(lambda role, action: errno.EIO if fails[0] and action in ("write", "read") else None)
    store = World(tmp_path / "state", host_bytes=0, folder_class=broken).open()
    blocks = blocks_for(store, TOKENS)
    spill(store, blocks, "disk")
    fails[0] = True
    assert loaded(store, blocks) == 0
    with pytest.raises(StateRefusedError):
        store.put(TALK)
    facts = store.top()["tiers"]["disk"]
    assert {kind: own["failures"] for kind, own in facts["kinds"].items()} == {"kv": 1, "session": 1}
    assert facts["failures"] == 2 and facts["misses"] == 0
    store.close()
