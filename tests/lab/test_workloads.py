"""Workloads: each keeps what its name promises, each knob turns one thing, and a seed gives one plan everywhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.errors import ConfigError
from nanovllm.lab import workloads
from nanovllm.lab.draws import Draws
from nanovllm.lab.workload_stats import describe, gap_variation, overlap
from nanovllm.lab.workloads import SETTINGS, PlannedRequest, Workload, generate
from nanovllm.observe.probe import ALL

NAMES = ("short_ctx", "long_ctx", "mixed_ctx", "rag", "agent", "multi_turn", "multi_tenant", "bursty")
# The plan of seed 7, hashed. These may change only where a workload's definition is meant to change.
PLANS = {
    "short_ctx": "df5ebf513b9787d0",
    "long_ctx": "c6a596657489b464",
    "mixed_ctx": "06f1ddfd22a48a9e",
    "rag": "e1d6afbdcc56a287",
    "agent": "425537e2e0b77d33",
    "multi_turn": "88585d82f0d0b1f3",
    "multi_tenant": "8fb4f71ed0827309",
    "bursty": "2d104ce85b471434",
}


def plan_hash(workload: Workload) -> str:
    return hashlib.sha256(json.dumps(asdict(workload), sort_keys=True).encode()).hexdigest()[:16]


def contents(request: PlannedRequest) -> list[Any]:
    return [part for part in request.parts if part.name in ("user", "tool")]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_plan_everywhere(name: str) -> None:
    assert plan_hash(generate(name, seed=7)) == PLANS[name]
    assert plan_hash(generate(name, seed=8)) != PLANS[name]


def test_the_names_are_callables_too() -> None:
    assert tuple(SETTINGS) == NAMES
    for name in NAMES:
        assert getattr(workloads, name)(seed=3, sessions=2) == generate(name, seed=3, sessions=2)


# -- what the names promise ------------------------------------------------------------------------


def figures(name: str, **turned: Any) -> dict[str, Any]:
    return describe(generate(name, **{"sessions": 100, **turned}))


def test_long_is_longer_than_short_and_a_mix_has_both() -> None:
    short, long, mixed = (figures(name)["prompt_len"] for name in ("short_ctx", "long_ctx", "mixed_ctx"))
    assert (short["mean"], long["mean"]) == (pytest.approx(64, rel=0.1), pytest.approx(768, rel=0.1))
    assert long["min"] > 5 * short["max"]
    lens = generate("mixed_ctx", sessions=100).prompt_lens().values()
    assert {length <= short["max"] for length in lens} == {True, False}
    assert not [length for length in lens if short["max"] < length < long["min"]]
    assert mixed["variance"] > 5 * long["variance"]


def test_rag_raises_the_prompt_length_and_its_variance() -> None:
    """R127: the same questions with and without what was retrieved."""
    plain, rag = (figures("rag", documents=documents)["prompt_len"] for documents in (0, 3))
    assert rag["mean"] > 3 * plain["mean"] and rag["variance"] > 100 * plain["variance"]
    with_documents, without = (generate("rag", documents=documents).requests for documents in (3, 0))
    assert [contents(request) for request in with_documents] == [contents(request) for request in without]


def test_hot_documents_come_again() -> None:
    asked = [part for request in generate("rag", sessions=100).requests for part in request.parts]
    documents = [part.token_ids for part in asked if part.name == "document"]
    assert len(set(documents)) <= 32
    assert max(documents.count(document) for document in set(documents)) > 4 * len(documents) / 32


def test_multi_turn_grows_a_history() -> None:
    workload = generate("multi_turn", turns=5, sessions=8)
    lens = workload.prompt_lens()
    for session in range(8):
        grown = [lens[f"s{session}-t{turn}"] for turn in range(5)]
        assert grown == sorted(set(grown))
    later = [request for request in workload.requests if request.turn]
    assert all(request.continues and request.delay_ns == 500 * 10**6 for request in later)
    assert figures("multi_turn")["overlap"]["overlap_share"] > 0.5 > figures("short_ctx")["overlap"]["overlap_share"]


def test_agents_share_their_tools_and_add_answers_of_uneven_length() -> None:
    requests = generate("agent", sessions=20).requests
    systems = {request.parts[0].token_ids for request in requests if request.turn == 0}
    added = [request.new_tokens for request in requests if request.turn]
    assert len(systems) == 1 and {request.parts[-1].name for request in requests if request.turn} == {"tool"}
    assert min(added) < 30 < 150 < max(added)


def test_tenants_have_prompts_of_their_own_and_uneven_shares() -> None:
    workload = generate("multi_tenant", sessions=100)
    by_tenant: dict[str, set[Any]] = {}
    for request in workload.requests:
        by_tenant.setdefault(request.namespace, set()).add(request.parts[0].token_ids)
    assert len(by_tenant) == 4 and all(len(systems) == 1 for systems in by_tenant.values())
    assert len(set.union(*by_tenant.values())) == 4
    counts = [figure.requests for figure in overlap(workload, 16) if figure.namespace != ALL]
    assert max(counts) > 2 * min(counts)


def test_bursty_has_bursts() -> None:
    smooth, bursts = (figures("bursty", burstiness=b)["gap_variation"] for b in (1.0, 0.1))
    assert 0.7 < smooth < 1.4 and bursts > 2
    assert gap_variation([0, 10, 20, 30]) == 0
    assert gap_variation([5, 5]) is None and gap_variation([]) is None


# -- the knobs -------------------------------------------------------------------------------------

VIEWS = {
    "arrivals": lambda r: (r.arrival_ns, r.after, r.delay_ns, r.continues),
    "outputs": lambda r: r.output_len,
    "namespaces": lambda r: r.namespace,
    "systems": lambda r: [part for part in r.parts if part.name == "system"],
    "documents": lambda r: [part for part in r.parts if part.name == "document"],
    "contents": contents,
}
BASE = {
    "turns": 3, "sessions": 8, "shared_len": 20, "documents": 2, "tenants": 3, "long_share": 0.5, "rate": 4.0,
    "follow_len": 30, "think_ms": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("knob", "value", "moved"),
    [
        ("length", 200, {"contents"}),
        ("spread", 0.0, {"contents", "outputs"}),
        ("long_len", 300, {"contents"}),
        ("long_share", 0.9, {"contents"}),
        ("follow_len", 60, {"contents"}),
        ("output_len", 5, {"outputs"}),
        ("shared_len", 40, {"systems"}),
        ("documents", 4, {"documents"}),
        ("document_len", 50, {"documents"}),
        ("catalogue", 3, {"documents"}),
        ("tenants", 1, {"namespaces", "systems"}),
        ("rate", 9.0, {"arrivals"}),
        ("burstiness", 0.2, {"arrivals"}),
        ("concurrency", 2, {"arrivals"}),
        ("think_ms", 50, {"arrivals"}),
    ],
)
def test_a_knob_turns_one_thing(knob: str, value: Any, moved: set[str]) -> None:
    """R132: length, concurrency and turns, and every other knob, each leave the others' streams as they were."""
    before, after = (generate("short_ctx", **{**BASE, **more}).requests for more in ({}, {knob: value}))
    changed = {name for name, view in VIEWS.items() if [*map(view, before)] != [*map(view, after)]}
    assert changed == moved


@pytest.mark.parametrize(("knob", "more"), [("turns", 5), ("sessions", 12)])
def test_more_of_it_leaves_the_first_ones_as_they_were(knob: str, more: int) -> None:
    before, after = (generate("short_ctx", **{**BASE, **turned}).requests for turned in ({}, {knob: more}))
    kept = {request.request_id: request for request in after}
    assert len(after) > len(before) and all(kept[request.request_id] == request for request in before)


def test_longer_content_begins_with_the_shorter_one() -> None:
    short, long = (generate("short_ctx", length=length, spread=0).requests[0].parts[0] for length in (10, 90))
    assert long.token_ids[:10] == short.token_ids


KNOBS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "sessions": st.integers(1, 9),
        "turns": st.integers(1, 4),
        "concurrency": st.none() | st.integers(1, 4),
        "length": st.integers(1, 40),
        "documents": st.integers(0, 2),
        "tenants": st.integers(1, 3),
        "shared_len": st.integers(0, 5),
        "output_len": st.integers(1, 5),
    }
)


@given(turned=KNOBS)
@settings(max_examples=50)
def test_every_plan_can_be_carried_out(turned: dict[str, Any]) -> None:
    workload = generate("short_ctx", **turned)
    told: set[str] = set()
    for request in workload.requests:
        assert (request.arrival_ns is None) == (request.after is not None)
        assert request.after is None or request.after in told
        assert request.new_tokens >= 1 and request.output_len >= 1
        assert all(0 <= token_id < 256 for part in request.parts for token_id in part.token_ids)
        told.add(request.request_id)
    assert len(told) == len(workload.requests) == turned["sessions"] * turned["turns"]
    started = [request for request in workload.requests if request.arrival_ns is not None]
    assert len(started) == min(turned["sessions"], turned["concurrency"] or turned["sessions"])


@pytest.mark.parametrize(
    ("turned", "word"),
    [
        ({"turns": 0}, "turns"),
        ({"spread": 1.5}, "spread"),
        ({"rate": 0}, "rate"),
        ({"documents": -1}, "documents"),
        ({"lenght": 3}, "'length'"),
        ({"burstiness": 0}, "burstiness"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_what_cannot_be_is_refused(turned: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        generate("rag", **turned)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="multi_turn"):
        generate("multiturn")


def test_draws() -> None:
    draws = Draws(0, "test")
    assert {draws.near(10, 0.25) for _ in range(200)} == {8, 9, 10, 11, 12}
    assert {draws.near(1, 1.0) for _ in range(50)} == {1, 2}
    ranks = [draws.ranked(4) for _ in range(2000)]
    assert [ranks.count(k) / 2000 for k in range(4)] == [pytest.approx(w, abs=0.04) for w in (0.48, 0.24, 0.16, 0.12)]
    assert Draws(0, "test").tokens(5, 9) == Draws(0, "test").tokens(8, 9)[:5] != Draws(0, "other").tokens(5, 9)


def test_a_description_is_json() -> None:
    """With an infinite rate too, of which JSON knows nothing."""
    document = json.loads(json.dumps(describe(generate("rag")), allow_nan=False))
    assert document["knobs"]["rate"] is None and document["overlap"]["label"] == "observe-only"
    assert document["label"] == "simulated" and document["prompt_len"]["sum"] == document["overlap"]["tokens"]


def test_words_for_who_needs_text() -> None:
    part = generate("short_ctx").requests[0].parts[0]
    assert len(workloads.as_text(part).split()) == len(part.token_ids)
