"""What the pages say of state beneath the engine, run as a reader would."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]


def blocks_with(page: str, word: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in code]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_put_pin_evict_and_explain_as_the_readme_shows_them(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks_with(page, "state_store")
    assert len([line for line in code.splitlines() if line and "import" not in line]) == 6
    with LLM("tiny:random", dtype="float32", num_blocks=64, check_invariants=True, progress=False) as llm:
        exec(code, {"llm": llm, "SamplingParams": SamplingParams})  # noqa: S102  it is what is tested
        assert llm.engine.scheduler.kv.block_manager.leases  # type: ignore[attr-defined]  # the pin holds
    pinned, evicted, story = capsys.readouterr().out.splitlines()
    assert pinned == "0 of 2 blocks held on the device; the other 2 when they are computed, for 600 s"
    assert evicted.endswith("candidates went") and story == "['put', 'pin']"


@pytest.mark.parametrize("page", ["docs/state_engine.md", "docs/state_engine.zh.md"])
def test_a_second_process_finds_what_the_first_left(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks_with(page, "state_dir")
    exec(code, {})  # noqa: S102  it is what is tested
    cached, by_tier = capsys.readouterr().out.strip().split(" ", 1)
    assert int(cached) > 0 and by_tier == f"{{'disk': {cached}}}"


@pytest.mark.parametrize("page", ["docs/state_engine.md", "docs/state_engine.zh.md"])
def test_every_setting_is_on_the_page(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    settings = [field for field in fields(EngineConfig) if field.name.startswith("state_")]
    assert settings and all(f"| `{field.name}` |" in text for field in settings)
    assert all(f"| {field.default} |" in text for field in settings if isinstance(field.default, str))
