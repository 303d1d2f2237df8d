"""The border of the state plane: what may be put, how it may be called, and what is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import EngineClosedError, InvalidRequestError
from nanovllm.state.objects import Metadata, Session, check_state_id, check_tokens, new_state_id
from nanovllm.state.payload import decode, encode, object_of, payload_of
from nanovllm.state.receipts import MAX_RECEIPTS, PER_OBJECT, History, Receipt
from tests.state.stores import World

ROOT = Path(__file__).resolve().parents[2]


def test_the_state_plane_needs_neither_torch_nor_an_engine() -> None:
    code = """
import pkgutil, importlib, sys
import nanovllm.state
for module in pkgutil.walk_packages(nanovllm.state.__path__, "nanovllm.state."):
    importlib.import_module(module.name)
heavy = [name for name in sys.modules if name.split(".")[0] in ("torch", "numpy", "transformers")]
heavy += [name for name in sys.modules if name.startswith(("nanovllm.engine", "nanovllm.models", "nanovllm.kernels"))]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_ids_are_random_and_told_by_their_form() -> None:
    ids = {new_state_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(check_state_id(state_id) == state_id for state_id in ids)
    for bad in ("", "x" * 32, "A" * 32, "0" * 31, "0" * 33, "../" + "0" * 29, None, 7, b"0" * 32):
        with pytest.raises(InvalidRequestError, match="32 hex digits"):
            check_state_id(bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "index"),
        ("kind", 3),
        ("name", ""),
        ("name", "a" * 129),
        ("name", "a@b"),
        ("name", "."),
        ("version", ".."),
        ("name", "a\nb"),
        ("name", "\ud800"),
        ("namespace", "a/b"),
        ("namespace", "a\\b"),
        ("namespace", "nul\0"),
        ("namespace", None),
        ("ttl", 0),
        ("ttl", -1),
        ("ttl", float("nan")),
        ("ttl", float("inf")),
        ("ttl", True),
        ("ttl", "5"),
        ("durable", "yes"),
        ("version", "1"),
        ("colour", "blue"),
    ],
)
def test_metadata_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Metadata.of({field: value})
    assert field in caught.value.message or field in (caught.value.param or "")


@given(st.text(min_size=1, max_size=128))
def test_a_name_is_either_kept_as_it_is_or_refused(name: str) -> None:
    try:
        assert Metadata.of({"name": name}).name == name
    except InvalidRequestError as error:
        assert error.param == "name"


def test_arguments_of_verbs_are_refused_by_name() -> None:
    store = World(None).open()
    state_id = store.put("text")
    for verb in (store.get, store.find, store.drop, store.export, store.pin, store.unpin, store.explain, store.fork):
        for bad in (None, 5, b"id", ["id"]):
            with pytest.raises(InvalidRequestError) as caught:
                verb(bad)  # type: ignore[arg-type]
            assert caught.value.param == "state_id"
    for wrong in ("1", True, 1.0):
        with pytest.raises(InvalidRequestError) as caught:
            store.update(state_id, "new", generation=wrong)  # type: ignore[arg-type]
        assert caught.value.param == "generation"
    for bad in ("5", -1, 1.5, True):
        with pytest.raises(InvalidRequestError) as caught:
            store.evict(bytes=bad)  # type: ignore[arg-type]
        assert caught.value.param == "bytes"
    verbs = {"device": (store.pin, store.unpin), "tier": (store.migrate,)}
    calls = [(param, lambda bad, verb=verb: verb(state_id, bad)) for param in verbs for verb in verbs[param]]
    calls += [("tier", lambda bad: store.verify(bad)), ("tier", lambda bad: store.evict(tier=bad))]
    calls += [("bundle", store.import_), ("limit", lambda bad: store.ls(limit=bad))]
    for param, call in calls:
        for wrong in (-5, ["disk"], {"disk": 1}):
            with pytest.raises(InvalidRequestError) as caught:
                call(wrong)
            assert caught.value.param == param
    with pytest.raises(InvalidRequestError, match="bundle"):
        store.import_(None)  # type: ignore[arg-type]
    for tier in ("dsik", "", "device"):
        with pytest.raises(InvalidRequestError, match="no tier") as caught:
            store.verify(tier)
        assert caught.value.param == "tier"
    assert store.verify("host").ok and store.verify().ok
    assert store.get(state_id) == "text" and store.find(state_id).generation == 1


def test_an_id_may_be_a_name_and_a_text() -> None:
    store = World(None).open()
    first = store.put("text")
    second = store.put(first, {"name": first, "namespace": first})
    obj = store.find(second)
    assert store.get(second) == first and (obj.name, obj.namespace) == (first, first)
    assert store.find(first, namespace=first) is obj, "the id is another tenant's, the name is one's own"
    assert store.find(first).state_id == first


def test_a_closed_store_says_so_whatever_it_is_asked() -> None:
    store = World(None).open()
    state_id = store.put("text")
    bundle = store.export(state_id)
    store.close()
    by_id = (store.get, store.find, store.drop, store.export, store.pin, store.unpin, store.explain, store.fork)
    calls = [lambda verb=verb: verb(state_id) for verb in (*by_id, store.leaving)]
    calls += [store.ls, store.top, store.evict, store.verify, lambda: store.put("b"), lambda: store.import_(bundle)]
    calls += [
        lambda: store.update(state_id, "b"),
        lambda: store.migrate(state_id, "host"),
        lambda: store.match([1] * 8),
    ]
    calls += [lambda: store.holdings("default", "kv"), lambda: store.load([]), lambda: store.spill([])]
    calls += [lambda: store.lookup([]), lambda: store.later("get", lambda result, error: None, state_id=state_id)]
    for call in calls:
        with pytest.raises(EngineClosedError):
            call()


def test_tokens_are_integers() -> None:
    assert check_tokens([0, 5]) == (0, 5)
    for bad in (True, -1, 2**31, 1.0, "1", None):
        with pytest.raises(InvalidRequestError, match="token id"):
            check_tokens([bad])


def test_a_history_is_bounded_and_says_what_it_forgot() -> None:
    history = History()
    for _ in range(PER_OBJECT + 5):
        history.add(Receipt(history.next_seq(), "pin", True, "asked"), ["a"])
    kept, forgotten = history.of("a")
    assert len(kept) == PER_OBJECT and forgotten == 5 and kept[-1].seq == PER_OBJECT + 5
    assert history.of("b") == ((), 0)
    for i in range(MAX_RECEIPTS):
        history.add(Receipt(history.next_seq(), "put", True, "asked"), [f"object {i}"])
    assert history.of("a") == ((), 0) and len(history.of(f"object {MAX_RECEIPTS - 1}")[0]) == 1
    assert sum(len(history.of(f"object {i}")[0]) for i in range(MAX_RECEIPTS)) == MAX_RECEIPTS


def test_facts_of_a_session_come_back_and_a_session_written_before_has_none() -> None:
    facts = {"object": "conversation", "metadata": {"a": "b"}, "depth": [1, 2.5, None, True]}
    talk = Session([{"role": "user", "content": "hi"}], [1, 2], facts)
    assert object_of(decode(encode(payload_of(talk), 1 << 20))) == talk
    before = msgspec.msgpack.encode({"form": "session", "token_ids": [1, 2], "messages": [*talk.messages]})
    assert object_of(decode(before)) == Session(talk.messages, [1, 2])
    assert encode(payload_of(Session(talk.messages, [1, 2])), 1 << 20) == before
    with pytest.raises(TypeError):
        payload_of(Session([], [], ["no mapping"]))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError):
        payload_of(Session([], [], {"a": object()}))
