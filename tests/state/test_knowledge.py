"""Documents in the store: their path is kept, names stand for the newest, one tenant's texts are bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.errors import StateNotFoundError, StateRefusedError
from nanovllm.state.objects import DEFAULT_NAMESPACE, PUBLIC, Document, Session
from nanovllm.state.settings import StateSettings
from nanovllm.state.store import StateStore
from tests.state.fake_device import FakeDevice
from tests.state.stores import World, blocks_for, check_books, spill

TOKENS = list(range(40))


def test_a_documents_path_comes_back_with_it(tmp_path: Path) -> None:
    whole = Document("text", TOKENS, "system", "<{document}>")
    with StateStore.open(tmp_path) as store:
        ids = [store.put(doc) for doc in (whole, Document("text"), Document("text", TOKENS))]
    with StateStore.open(tmp_path) as store:
        assert store.get(ids[0]) == whole
        assert store.get(ids[1]) == Document("text", []) and store.get(ids[2]) == Document("text", TOKENS)


def test_a_name_is_looked_up_within_a_kind() -> None:
    with StateStore.open() as store:
        talk = store.put([{"role": "user", "content": "hi"}], {"name": "x"})
        tokens, text = store.put(TOKENS, {"name": "x"}), store.put("text", {"name": "x"})
        for kind, found in (("session", talk), ("kv", tokens), ("knowledge", text)):
            assert store.find("x", DEFAULT_NAMESPACE, kind=kind).state_id == found
        for name in ("y", talk, tokens):
            with pytest.raises(StateNotFoundError):
                store.find(name, DEFAULT_NAMESPACE, kind="knowledge")


def test_a_public_documents_kv_is_that_of_prompts_which_belong_to_no_tenant() -> None:
    with StateStore.open() as store:
        public, own, theirs = (
            store.find(store.put(Document("t", TOKENS), {"namespace": namespace}))
            for namespace in (PUBLIC, DEFAULT_NAMESPACE, "tenant")
        )
        assert public.chain == own.chain and public.root == own.root
        assert not set(theirs.chain) & set(own.chain)


@pytest.mark.parametrize("is_under_way", [False, True])
def test_a_removed_document_leaves_no_kv_with_any_key_but_what_a_conversation_owns(
    tmp_path: Path, is_under_way: bool
) -> None:
    """Also where a hint owned it, and where a sequence runs on it: then when that ends."""
    device = FakeDevice(num_blocks=32)
    store = World(tmp_path / "state").open(device=device)
    document = store.put(Document("text", TOKENS[:12]), {"namespace": PUBLIC})
    asked = {name: blocks_for(store, [*TOKENS[:12], 77, 78, 79, 80], name) for name in ("a", "b", "c")}
    for blocks in asked.values():
        spill(store, blocks, "disk")
        device.compute(blocks)
    store.note_session("talk", "a", [block.digest for block in asked["a"]])
    store.put(Session([], TOKENS[:12]), {"namespace": "b"})
    lease = device.hold([asked["a"][0].digest], "sequence") if is_under_way else None
    receipt = store.drop(document)
    assert receipt.ok and receipt.detail["blocks_in_use"] == int(is_under_way)
    if lease is not None:
        device.release(lease)
    store.tick()
    assert [store.match(TOKENS[:12], name).num_tokens for name in ("a", "b", "c")] == [0, 12, 0]
    for name, left in (("a", 1), ("b", 4), ("c", 1)):  # the question behind it is the prompt's own
        digests = [block.digest for block in asked[name]]
        assert sum(map(device.holds, digests)) == left
        assert sum(digest in store.plane.catalog.entries for digest in digests) == left
    assert store.find("talk", "a").num_tokens == 4
    check_books(store)
    store.close()


def test_ones_own_document_goes_whatever_a_hint_says(tmp_path: Path) -> None:
    store = World(tmp_path / "state").open()
    for path in (TOKENS[:12], TOKENS[:8]):
        document = store.put(Document("text", path), {"namespace": "a", "name": "d"})
        spill(store, blocks_for(store, TOKENS[:12], "a"), "disk")
        store.note_session("talk", "a", store.plane.chain_of(TOKENS[:12], "a"))
        assert store.drop(document).ok and store.match(TOKENS[:12], "a").num_tokens == 0
        check_books(store)
    store.close()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["1", "2", None]), st.sampled_from([-50, 0, 0, 1])), min_size=1, max_size=6))
def test_the_newest_is_the_newest_after_a_restart_whatever_the_clock_did(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[str | None, int]]
) -> None:
    folder, now = tmp_path_factory.mktemp("store"), [1_000]
    with StateStore.open(folder, wall_ms=lambda: now[0]) as store:
        for version, ms in puts:
            now[0] += ms
            last = store.put(f"{version}", {"name": "doc", "version": version})
        assert store.find("doc", DEFAULT_NAMESPACE).state_id == last
    with StateStore.open(folder) as store:
        assert store.find("doc", DEFAULT_NAMESPACE).state_id == last
        versions = {version for version, _ in puts}
        assert {obj.version for obj in store.ls()} == versions
        for version in versions - {None}:
            assert store.get(f"doc@{version}", DEFAULT_NAMESPACE) == version


def test_one_tenants_texts_fill_nobodys_disk(tmp_path: Path) -> None:
    with StateStore.open(tmp_path, settings=StateSettings(text_bytes_per_namespace=1_000)) as store:
        first = store.put("x" * 600, {"namespace": "a"})
        with pytest.raises(StateRefusedError, match="1,000 is the most"):
            store.put("x" * 600, {"namespace": "a"})
        assert store.put("x" * 600, {"namespace": "b"})
        assert store.update(first, "x" * 900).ok
        with pytest.raises(StateRefusedError):
            store.update(first, "x" * 1_100)
        assert store.get(first) == "x" * 900
        store.drop(first)
        assert store.put("x" * 600, {"namespace": "a"})
    again = StateStore.open(tmp_path, settings=StateSettings(text_bytes_per_namespace=1_000))
    with again as store, pytest.raises(StateRefusedError):
        store.put("x" * 600, {"namespace": "a"})
