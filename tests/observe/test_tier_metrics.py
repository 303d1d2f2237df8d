"""The tiers' metrics of a real engine with a folder: after known spills, loads, damage and failures, and a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm import LLM
from nanovllm.observe.tier_metrics import KINDS, Row, TierFacts, TierMetrics
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.tiers.folder import Folder, io_errors
from tests.engine.test_state_exact import GREEDY, PROMPT, TINY, forget_device


def page(metrics: TierMetrics, facts: TierFacts) -> dict[str, Row]:
    return {row.name: row for row in metrics.rows(facts)}


def tiers(llm: LLM) -> TierFacts:
    return llm.state_store.top()["tiers"]


def test_the_kinds_are_the_state_planes() -> None:
    assert set(KINDS) == set(KIND_TABLE)


def test_bytes_reads_and_failures_by_tier_and_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = TierMetrics()
    assert not any(row.values for row in metrics.rows({}))
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        llm.state_store.put("A text.", {"name": "text"})
        llm.generate([PROMPT], GREEDY)
        forget_device(llm)
        assert llm.generate([PROMPT], GREEDY)[0].cached_tokens == 68
        forget_device(llm)
        shown = page(metrics, tiers(llm))
        disk = llm.state_store.plane.places["disk"]
        assert shown["state_tier_reads"].values["disk", "kv", "hit"] == 17
        assert shown["state_tier_bytes"].values["disk", "kv", "read"] == 17 * 2048
        assert shown["state_load_blocks"].values["disk", "kv", "loaded"] == 17
        assert sum(shown["state_load_blocks"].values.values()) == 17
        held = shown["state_tier_held_bytes"].values
        assert held["disk", "knowledge"] > 0 < held["disk", "kv"] and held["disk", "session"] == 0
        assert shown["state_tier_quota_bytes"].values["disk",] == disk.tier.quota_bytes
        assert shown["tier_breaker_state"].values["disk", "reads"] == 0

        def fails(self: Folder, *_: object) -> bytes:
            with io_errors(self.role, "read"):
                raise OSError(5, "as told")

        with monkeypatch.context() as patched:
            patched.setattr(Folder, "read", fails)
            for _ in range(6):
                llm.generate([PROMPT], GREEDY)
                forget_device(llm)
            shown = page(metrics, tiers(llm))
        assert shown["state_tier_failures"].values["disk", "kv"] == 5
        assert shown["tier_breaker_state"].values["disk", "reads"] == 2
        before = shown
    assert page(metrics, {})["state_tier_reads"].values == before["state_tier_reads"].values, "between two engines"
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:  # another process counts from 0; the totals go on
        llm.generate([PROMPT], GREEDY)
        shown = page(metrics, tiers(llm))
    assert shown["state_tier_reads"].values["disk", "kv", "hit"] == 34
    assert shown["state_load_blocks"].values["disk", "kv", "loaded"] == 34
    assert shown["state_tier_failures"].values == before["state_tier_failures"].values
    assert all(row.values.keys() == before[name].values.keys() for name, row in shown.items()), "no label comes later"
    assert sum(len(row.values) for row in shown.values()) < 60 * len(tiers_of(shown))


def tiers_of(shown: dict[str, Row]) -> set[str]:
    return {values[0] for row in shown.values() for values in row.values}


def test_damage_and_moves_are_told_apart() -> None:
    of_kv = {"hits": 3, "misses": 5, "corrupt": 2, "evicted": 4, "demoted": 1, "bytes_read": 7, "bytes_written": 8}
    facts = {"host": {"by_kind": {}, "kinds": {"kv": of_kv}, "quota_bytes": None, "breaker": {"reads": "half_open"}}}
    shown = page(TierMetrics(), facts)
    assert {word: n for (_, kind, word), n in shown["state_tier_reads"].values.items() if kind == "kv"} == {
        "hit": 3, "miss": 3, "corrupt": 2,
    }  # fmt: skip
    assert shown["state_tier_evictions"].values["host", "kv", "evicted"] == 3
    assert shown["state_tier_evictions"].values["host", "kv", "moved_down"] == 1
    assert shown["state_tier_quota_bytes"].values == {}
