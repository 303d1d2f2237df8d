"""S5 and S13: sound bytes of another engine are a miss, and a bundle that was tampered with leaves no trace."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec import structs
from xxhash import xxh3_128_digest

from nanovllm.core.digest import root_digest
from nanovllm.errors import NanoVLLMError, StateBundleError
from nanovllm.state.bundle import MAGIC
from nanovllm.state.envelope import SUM_BYTES, pack_tokens
from nanovllm.state.objects import Session
from nanovllm.state.settings import StateSettings
from nanovllm.state.store import StateStore
from tests.state.fake_device import FakeDevice
from tests.state.stores import World, blocks_for, check_books, loaded, spill

TOKENS = list(range(16))
TALK = Session([{"role": "user", "content": "hi"}], TOKENS)


class Engine(NamedTuple):
    """What makes an engine another one. Only `model` is in the roots here, so the envelope has to tell the rest."""

    layout: str = "4x3x2x1x10/bf16"
    block_size: int = 4
    namespace: str = "default"
    model: str = "m"

    def open(self, folder: Path) -> StateStore:
        settings = StateSettings(block_size=self.block_size, layout=self.layout, layers=3)
        return World(folder, host_bytes=0).open(settings=settings, root_of=lambda _: root_digest({"m": self.model}))


ENGINES = {
    "base": Engine(),
    "dtype": Engine(layout="4x3x2x1x10/float32"),
    "heads": Engine(layout="4x3x2x2x5/bf16"),
    "layers": Engine(layout="2x3x2x2x10/bf16"),
    "shard": Engine(layout="4x3x2x1x10/bf16/1of2"),
    "block": Engine(layout="8x3x2x1x10/bf16", block_size=8),
    "tenant": Engine(namespace="b"),
    "model": Engine(model="other"),
}


@pytest.mark.parametrize(("writer", "reader"), [*itertools.permutations(ENGINES, 2)])
def test_sound_bytes_of_another_engine_are_a_miss(tmp_path: Path, writer: str, reader: str) -> None:
    one, two = ENGINES[writer], ENGINES[reader]
    store = one.open(tmp_path / "state")
    text = store.put(TALK)
    assert spill(store, blocks_for(store, TOKENS, one.namespace), "disk")
    assert loaded(store, blocks_for(store, TOKENS, one.namespace)) == 16 // one.block_size
    store.close()
    store = two.open(tmp_path / "state")
    blocks = blocks_for(store, TOKENS, two.namespace)
    same_names = {block.digest for block in blocks} <= set(store.plane.catalog.entries)
    assert loaded(store, blocks) == 0 and store.get(text) == TALK
    assert (store.plane.places["disk"].counters.corrupt > 0) == same_names, "found under its name, and refused"
    assert same_names == ("block" not in (writer, reader) and "model" not in (writer, reader))
    check_books(store)
    store.close()


@pytest.mark.parametrize("verb", ["pin", "export"])
def test_kv_of_a_deleted_text_goes_though_another_model_learnt_its_chain(tmp_path: Path, verb: str) -> None:
    world = World(tmp_path / "state", host_bytes=0)
    with world.open() as store:
        text, chain = store.put(TALK), store.plane.chain_of(TOKENS, "default")
        assert spill(store, blocks_for(store, TOKENS), "disk")
    with world.open(model="another") as store:  # nobody's engine: it looks, and leaves the KV to the model that comes
        store.export(text)
    with world.open(model="another", device=FakeDevice()) as store:
        disk = store.plane.places["disk"].tier
        assert all(disk.contains(chain))
        getattr(store, verb)(text)
        assert store.find(text).chain != chain and store.drop(text).ok
        assert not any(disk.contains(chain))
        check_books(store)
    packed = pack_tokens(TOKENS[:4])
    assert not any(packed in file.read_bytes() for file in (tmp_path / "state" / "kv").iterdir())


def test_another_block_size_is_told_at_the_start(tmp_path: Path) -> None:
    with ENGINES["base"].open(tmp_path / "state") as store:
        text = store.put(TALK)
        assert store.explain(text).facts["same_model"] and not store.warnings
    with ENGINES["block"].open(tmp_path / "state") as store:
        assert ["block size" in warning for warning in store.warnings] == [True]
        assert not store.explain(text).facts["same_model"]


@pytest.mark.parametrize(
    ("model", "times", "host_bytes", "why"),
    [
        ("other", 1, 1 << 20, "4 are of another model, layout or namespace"),
        ("m", 2, 1 << 20, "4 are here already"),
        ("m", 1, 1_400, "for 4 there is no room"),
    ],
)
def test_an_import_says_why_blocks_were_not_taken(
    tmp_path: Path, model: str, times: int, host_bytes: int, why: str
) -> None:
    with World(tmp_path).open() as store:
        text = store.put(TALK)
        spill(store, blocks_for(store, TOKENS))
        bundle = store.export(text)
    with World(None, host_bytes=host_bytes).open(model=model) as store:
        receipt = [store.import_(bundle) for _ in range(times)][-1].receipt
        assert receipt is not None and receipt.reason == f"text, and 0 of 4 blocks: {why}"


def resealed(bundle: bytes, change: bytearray) -> bytes:
    """A bundle whose outer sum is right again: what is inside has to tell."""
    body = bytes(change[:-SUM_BYTES])
    return body + xxh3_128_digest(body)


@pytest.mark.parametrize("mutants", [100, pytest.param(2_000, marks=pytest.mark.long)])
def test_a_tampered_bundle_leaves_no_trace(tmp_path: Path, mutants: int) -> None:
    """Flips, cuts, doubled and swapped stretches, with the outer sum mended; the device's blocks are compared, too."""
    store = World(tmp_path / "a").open()
    state_id = store.put(TALK)
    spill(store, blocks_for(store, TOKENS)[:3], "disk")
    bundle = store.export(state_id)
    device = FakeDevice()
    other = World(tmp_path / "b").open(device=device)
    device.compute(blocks_for(other, [7] * 8))
    before, pool, rng = other.top(), dict(device.blocks), random.Random(mutants)
    for i in range(mutants):
        data = bytearray(bundle)
        at, length = rng.randrange(len(MAGIC), len(data) - SUM_BYTES), rng.randint(1, 64)
        if i % 4 == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif i % 4 == 1:
            del data[at : at + length]
        elif i % 4 == 2:
            data[at:at] = data[at : at + length]
        else:
            to = rng.randrange(len(MAGIC), len(data) - SUM_BYTES)
            data[at : at + length], data[to : to + length] = data[to : to + length], data[at : at + length]
        if resealed(bundle, data) == bundle:
            continue
        with pytest.raises(StateBundleError):
            other.import_(resealed(bundle, data))
    assert other.top() == before and dict(device.blocks) == pool and not other.ls()
    assert other.get(other.import_(bundle)) == TALK
    for one in (store, other):
        one.close()


def test_a_forged_bundle_is_refused_or_taken_and_never_breaks_anything(tmp_path: Path) -> None:
    """Whoever can seal can write state: what is inside may be false, and is then refused with a sentence."""
    store = World(tmp_path / "a").open()
    state_id = store.put(TALK)
    spill(store, blocks_for(store, TOKENS)[:3], "disk")
    bundles, plane = store._bundles, store.plane
    original, obj = store.export(state_id), store.find(state_id)
    forgeries = []
    for record in ({"kind": "kv"}, {"kind": "knowledge"}, {"kind": "dream"}, {"namespace": "b"}, {"ttl_ms": -1}):
        forgeries.append(store._wait(bundles.export(structs.replace(obj, **record))))
    real = plane.seal_block
    plane.seal_block = lambda label, payload: real(label, payload[:-1])  # type: ignore[method-assign]
    short = store._wait(bundles.export(obj))
    plane.seal_block = real  # type: ignore[method-assign]
    other = World(tmp_path / "b").open(device=FakeDevice())
    for forgery in (*forgeries, short):
        assert forgery != original
        try:
            taken = other.import_(forgery)
        except NanoVLLMError as error:
            assert error.status < 500
            continue
        assert other.get(taken) == TALK and other.find(taken).namespace == "default"
        assert loaded(other, blocks_for(other, TOKENS)) in ((0,) if forgery == short else (0, 3))
        other.drop(taken)
        other.settle()
        check_books(other)
    for one in (store, other):
        one.close()
