"""The benchmarks of the state plane on the built-in model: what they count is right; their times are not looked at."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a benchmark within this process; its JSON line."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        common = ["--model", "tiny:random", "--dtype", "float32", "--threads", "1", "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [name, *common, *arguments])
        importlib.import_module(name).main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_documents_asked_again(told: Any) -> None:
    sizes = ["--documents", "24", "--tokens", "64", "--questions", "72", "--turn", "9", "--pool-share", "0.3"]
    told_all = told("knowledge", *sizes, "--host-share", "0.5", "--load", "always", "--seeds", "0", "--none-every", "1")
    (report,) = told_all["by_seed"]
    none, device, tiers = (report["arms"][name] for name in ("none", "device", "tiers"))
    assert none["hit_tokens_by_tier"] == {} and set(device["hit_tokens_by_tier"]) == {"device"}
    assert set(tiers["hit_tokens_by_tier"]) == {"device", "host", "disk"}
    assert none["prompt_tokens"] == tiers["prompt_tokens"]
    assert device["hit_share"] < tiers["hit_share"]
    computed = tiers["by_source"]["computed"]["questions"]
    assert computed == round(72 * (1 - report["asked_again_share"]))  # whoever was asked before is found
    assert all(arm["first_answers_equal"] == 72 for arm in report["arms"].values())
    assert tiers["found"] == pytest.approx(report["asked_again_share"]) and device["found"] < tiers["found"]
    assert told_all["label"] == "measured" and told_all["none_over_tiers_p50"] == report["none_over_tiers_p50"] > 0


def test_a_restored_prefix(told: Any) -> None:
    report = told("state_restore", "--tokens", "128", "--repeats", "1")
    assert set(report["speedup"]) == {"cold", "host", "disk_warm", "disk_dropped"}
    (row,) = report["rows"]
    assert [row[case]["hit_tokens_by_tier"] for case in row] == [{}, {"host": 112}, {"disk": 112}, {"disk": 112}]
