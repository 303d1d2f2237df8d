"""Documents and an engine: what is found is exact, whichever tier it lay in; versions, removal, pins, eviction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nanovllm import LLM, SamplingParams
from nanovllm.engine.knowledge_prompt import chat_segments, ids_of, passage_of
from nanovllm.engine.parts import RequestArgs
from nanovllm.errors import ContextLengthError, InvalidRequestError, StateNotFoundError
from nanovllm.state.objects import Document
from tests.engine.test_state_docs import blocks_with
from tests.engine.test_state_exact import TINY, forget_device

LIBRARY = "The library of the town opens at 8 o'clock and closes at 20 o'clock. On Sundays it is closed. " * 2
SYSTEM = "Answer from the document, in one sentence."
ASK = [{"role": "user", "content": "When does the library open?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LIB: dict[str, Any] = {"text": LIBRARY, "name": "library", "version": "1", "system": SYSTEM}
WIDE: dict[str, Any] = {**TINY, "num_blocks": 400, "max_model_len": 640}


@contextmanager
def engine(**more: Any) -> Iterator[LLM]:
    with LLM(**{**WIDE, **more}) as llm:
        yield llm


def cold_answer(llm: LLM) -> tuple[list[int], int]:
    """What the very same ids are answered with where nothing is found; and how many tokens the document's path has."""
    passage = passage_of(llm.tokenizer, Document(LIBRARY, (), SYSTEM), "library@1")
    segments = chat_segments(llm.tokenizer, ASK, [passage])
    nobody = RequestArgs(prompt=ids_of(segments), sampling_params=GREEDY, namespace="nobody")
    (final,) = llm.engine.generate([nobody])
    assert final.cached_tokens == 0
    return final.token_ids, len(ids_of(segments[:-1]))


def test_an_answer_with_knowledge_is_that_of_a_cold_run_from_every_tier(tmp_path: Path) -> None:
    """SmolLM2 is asked through the server: `tests/serve/test_knowledge.py`."""
    with engine(state_dir=str(tmp_path), state_host_memory="64MiB") as llm:
        tokens, path = cold_answer(llm)
        size = llm.engine.scheduler.block_size
        found = path // size * size
        assert llm.state_store.find(llm.add_knowledge(**LIB)).num_tokens == path
        final = llm.chat(ASK, GREEDY, knowledge=["library"])[0]
        assert (final.token_ids, final.hit_tokens_by_tier) == (tokens, {"device": found})
        assert path - found < size and final.cached_tokens >= path - 2 * size
        assert [span.name for span in final.segments] == ["system", "document library@1", "question"]
        for tier in ("host", "disk"):
            forget_device(llm)
            final = llm.chat(ASK, GREEDY, knowledge=["library@1"])[0]
            assert final.token_ids == tokens and final.hit_tokens_by_tier.keys() == {tier}
            assert final.cached_tokens >= found
            llm.state_store.evict(tier="host", bytes=64 << 20)
    with engine(state_dir=str(tmp_path)) as llm:
        final = llm.chat(ASK, GREEDY, knowledge=["library"])[0]
        assert final.token_ids == tokens and final.hit_tokens_by_tier.keys() == {"disk"}
        assert final.cached_tokens >= found


def test_several_documents_in_one_order_and_the_first_ones_kv_is_there(tmp_path: Path) -> None:
    with engine() as llm:
        llm.add_knowledge("Zebra " * 20, "z", system=SYSTEM)
        llm.add_knowledge("Apple " * 20, "a", system=SYSTEM)
        one, other = (llm.chat(ASK, GREEDY, knowledge=names)[0] for names in (["z", "a"], ["a", "z", "a"]))
        assert one.prompt_token_ids == other.prompt_token_ids and one.token_ids == other.token_ids
        first_path = next(span.end for span in one.segments if span.name == "document a")
        assert one.cached_tokens == first_path // 4 * 4 and other.cached_tokens > one.cached_tokens
        with engine(prefix_mode="off") as plain:
            assert plain.generate([one.prompt_token_ids], GREEDY)[0].token_ids == one.token_ids


def test_a_pin_waits_for_the_kv_and_keeps_it_through_a_flood() -> None:
    with engine(num_blocks=200) as llm:
        state_id = llm.add_knowledge(**LIB)
        assert llm.state_store.pin(state_id, device="gpu").ok
        found = llm.state_store.find(state_id).num_tokens // 4 * 4
        for i in range(6):
            llm.generate([[(i * 37 + j) % 250 for j in range(400)]], GREEDY)
        assert llm.chat(ASK, GREEDY, knowledge=["library"])[0].hit_tokens_by_tier == {"device": found}
        assert llm.state_store.drop(state_id).ok
        assert not list(llm.engine.scheduler.kv.block_manager.leases)  # type: ignore[attr-defined]


def test_removal_takes_the_text_and_the_blocks_that_only_it_owned() -> None:
    with engine() as llm:
        mine, twin = llm.add_knowledge(**LIB), llm.add_knowledge("Another one. " * 8, "other", system=SYSTEM)
        store = llm.state_store
        chain, shared = store.find(mine).chain, set(store.find(mine).chain) & set(store.find(twin).chain)
        assert shared and len(shared) < len(chain), "they begin with one system text"
        assert store.drop("library", namespace="default").ok
        device = llm.engine.parts.state.device  # type: ignore[union-attr]
        assert {digest for digest in chain if device.holds(digest)} == shared
        with pytest.raises(StateNotFoundError):
            llm.chat(ASK, GREEDY, knowledge=["library"])


def test_what_cannot_be_asked_about_is_refused_and_not_kept() -> None:
    with engine() as llm:
        before = llm.state_store.ls()
        with pytest.raises(ContextLengthError, match="Nothing was kept"):
            llm.add_knowledge("x" * 640, "long")
        with pytest.raises(InvalidRequestError):
            llm.add_knowledge("x", "n", template="no slot")
        with pytest.raises(InvalidRequestError):
            llm.add_knowledge("x", "a@b")
        with pytest.raises(InvalidRequestError):
            llm.generate(["x"], GREEDY) and next(iter(llm.stream("x", GREEDY, knowledge=["library"])))
        assert llm.state_store.ls() == before
        talk = llm.state_store.put([{"role": "user", "content": "hi"}], {"name": "library"})
        for name in ("library", str(talk)):  # a session of that name is no document
            with pytest.raises(StateNotFoundError):
                llm.chat(ASK, GREEDY, knowledge=[name])


def test_a_text_that_was_put_without_a_path_can_be_asked_about() -> None:
    with engine() as llm:
        llm.state_store.put("The pool opens at 6.", {"name": "pool"})
        final = llm.chat(ASK, GREEDY, knowledge=["pool"])[0]
        assert "The pool opens at 6." in llm.tokenizer.decode(final.prompt_token_ids)


def test_the_pages_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, chinese = (blocks_with(f"docs/knowledge{tail}.md", "add_knowledge") for tail in ("", ".zh"))
    assert code == chinese and len([line for line in code[0].splitlines() if line]) <= 6
    exec(code[0].replace('"smollm2"', '"tiny:random", dtype="float32"'), {})  # noqa: S102  it is what is tested
    found, names = capsys.readouterr().out.rstrip().rpartition(" [")[::2]
    assert int(found.split()[-1]) >= 64 and names == "'system', 'document library', 'question']"


class Documents(RuleBasedStateMachine):
    """Uploads, new versions, removals, evictions and questions in any order; plain texts say what is right."""

    names = st.sampled_from(["a", "b"])
    versions = st.sampled_from([None, "1", "2"])

    @initialize()
    def start(self) -> None:
        self.context = engine(num_blocks=120, state_host_memory="1MiB")
        self.llm = self.context.__enter__()
        self.put: dict[tuple[str, str | None], str] = {}  # in the order of the last put
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.count = 0

    @rule(name=names, version=versions)
    def upload(self, name: str, version: str | None) -> None:
        self.count += 1
        text = f"{name} number {self.count} says {self.count * 7919}."
        self.llm.add_knowledge(text, name, version=version, system="S.")
        self.put.pop((name, version), None)
        self.put[name, version] = text

    @rule(name=names, version=st.none() | versions)
    def ask(self, name: str, version: str | None) -> None:
        """The newest, or that version; the very text, and the answer that these ids always had."""
        called = [key for key in self.put if key[0] == name and (version is None or key[1] == version)]
        asked = name if version is None else f"{name}@{version}"
        if not called:
            with pytest.raises(StateNotFoundError):
                self.llm.chat(ASK, GREEDY, knowledge=[asked])
            return
        final = self.llm.chat(ASK, GREEDY, knowledge=[asked])[0]
        shown = self.llm.tokenizer.decode(final.prompt_token_ids)
        assert shown.count(self.put[called[-1]]) == 1 and shown.count(" says ") == 1
        known = self.answers.setdefault(tuple(final.prompt_token_ids), final.token_ids)
        assert final.token_ids == known

    @rule(name=names, version=versions)
    def remove(self, name: str, version: str | None) -> None:
        key = name, version
        if key not in self.put:
            return
        store = self.llm.state_store
        label = name if version is None else f"{name}@{version}"
        (obj,) = [o for o in store.ls() if o.label == label and o.version == version]
        others = {digest for o in store.ls() if o.state_id != obj.state_id for digest in o.chain}
        assert store.drop(obj.state_id).ok
        del self.put[key]
        device = self.llm.engine.parts.state.device  # type: ignore[union-attr]
        gone = [digest for digest in obj.chain if digest not in others]
        assert not any(device.holds(digest) or digest in store.plane.catalog.entries for digest in gone)

    @rule()
    def evict(self) -> None:
        self.llm.state_store.evict(tier="device", bytes=1 << 16)

    @rule()
    def flood(self) -> None:
        self.count += 1
        self.llm.generate([[(self.count * 31 + j) % 250 for j in range(300)]], GREEDY)

    @invariant()
    def books_agree(self) -> None:
        objects = self.llm.state_store.ls(kind="knowledge")
        assert {(o.name, o.version) for o in objects} == self.put.keys()

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)


Documents.TestCase.settings = settings(max_examples=6, stateful_step_count=14, deadline=None)
TestDocuments = Documents.TestCase
